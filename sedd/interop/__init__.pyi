from .published import Published as Published
from .published import load_published as load_published
from .published import save_published as save_published
