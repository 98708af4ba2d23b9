"""The commands of ``sedd``, one module each with a ``main``, and the modules that only they use.

They are the top level of the package: ``sedd.__main__`` imports them by name, and nothing else in
the package imports them. They parse flags, print and write files; the computing is done below.
"""
