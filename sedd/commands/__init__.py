"""The commands; nothing imports them but ``sedd.__main__`` and the scripts at the top."""
