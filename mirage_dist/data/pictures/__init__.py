"""Pictures: the one way to open them, and checks of many at once."""

from mirage_dist.data.pictures.checked import Checked
from mirage_dist.data.pictures.many import Inspection, digests, faults, inspections, shared
from mirage_dist.data.pictures.opening import (
    Picture,
    PictureError,
    Size,
    as_png,
    encoded,
    no_path,
    open_picture,
    sha256,
    shortened,
    size_of,
)
from mirage_dist.data.pictures.stored import Reference, read_anew

# Of what `open_picture` makes of a file, in the keys of what was computed from pictures. 1 neither turned them nor put
# transparent ones on white.
REVISION = "2"

__all__ = [
    "REVISION",
    "Checked",
    "Inspection",
    "Picture",
    "PictureError",
    "Reference",
    "Size",
    "as_png",
    "digests",
    "encoded",
    "faults",
    "inspections",
    "no_path",
    "open_picture",
    "read_anew",
    "sha256",
    "shared",
    "shortened",
    "size_of",
]
