"""Published layouts, one module each: how a project writes its configuration and its tensors.

A module that defines ``matches`` is a layout. It must define all of the names below. A module may
instead define an object with these members, as ``LAYOUT``, or several, as ``LAYOUTS``; the layouts
of Llama-class models are such objects (``sedd.interop.layouts.decoder``).

- ``NAME``: the name of the layout;
- ``NETWORK``: the class of its networks;
- ``CODE``: a phrase that names the published code, such as "the code of RADD (arXiv:2406.03736)";
- ``matches(config, names) -> bool``: whether a configuration is of this layout; ``names`` are the
  names of its tensors, empty if they are not known;
- ``read(config) -> Layout``: read the configuration; UserError if keys are missing;
- ``refusals(network, description)``: a list of reasons why the layout cannot hold a model, empty if
  it can; None if the model is of another kind;
- ``tensors(network)``: a dictionary from our parameters to published names, in which ``{}`` stands
  for the number of a block;
- ``write(network, description) -> dict``: the content of the ``config.json``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
