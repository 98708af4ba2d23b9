"""Published layouts, one module each: how a project writes its configuration and its tensors.

A module is a layout if it defines ``matches``, and then has all of

- ``NAME`` and ``CODE``: the layout's name, and what else reads it;
- ``matches(config, names) -> bool``: whether a configuration and the names of its tensors (empty
  where they are not known yet) are of this layout;
- ``read(config) -> Layout``: the network and the description; UserError on what is missing;
- ``refusals(network, description) -> list of reasons or None``: why the layout cannot hold a model,
  none if it can; None if the model is of another kind;
- ``tensors(network) -> {our parameter: published name}``, ``{}`` standing for a block's number;
- ``write(network, description) -> dict``: the ``config.json`` that ``read`` reads.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
