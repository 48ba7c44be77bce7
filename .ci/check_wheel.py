"""Run by ``make wheel`` with the Python of an environment that holds the built wheel: is everything in it?"""

import importlib.metadata
import sys
from importlib.resources import files
from pathlib import Path

import lightning_nas.callbacks
import lightning_nas.recipes

import lightning_nas
import lightning_nas.modules

root = Path(lightning_nas.__file__).parent
assert root.parent == Path(sys.argv[1]), f"{root} is not the installed wheel, which is in {sys.argv[1]}"
assert Path(lightning_nas.callbacks.__file__).parent == root / "callbacks"
assert (root / "py.typed").exists()
assert list(files("lightning_nas.recipes").glob("*.yaml")), "no recipe was packaged"
reviews = files("lightning_nas.recipes") / "data" / "movie_reviews"
assert (reviews / "movie_reviews.tsv.gz").is_file(), "the example data are missing"
assert (reviews / "LICENSE").is_file(), "the licence of the example data is missing"
distribution = importlib.metadata.distribution("lightning-nas")
tops = {str(path).split("/")[0] for path in distribution.files or ()}
beside = {"lightning_nas", ".."}  # the command lies in bin, outside of site-packages
assert {top for top in tops if not top.endswith(".dist-info")} <= beside, tops
assert "Apache License" in (distribution.read_text("licenses/LICENSE") or ""), "the licence is missing"
