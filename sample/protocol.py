"""An evaluation's arguments and parts -> what its measures were measured by: settings, seeds and hashes, for their JSON."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from model.files import dump_config

if TYPE_CHECKING:
    from model.metaquery import MetaQuery


def protocol(args: Any, sha256: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """The evaluation's name and every setting of it, seeds included; the sha256 of all tensors of what took part, by its
    role; versions; and `more`. The same for the same command, and free of dates."""
    where = ("json", "html", "grid", "keep")  # results go there, and nothing comes of it
    settings = {name: value for name, value in dump_config(args).items() if name not in where}
    software = {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()}
    what = (type(args).__doc__ or "").splitlines()[0]
    told = {"evaluation": type(args).__name__.lower(), "what": what, "settings": settings, "sha256": dict(sha256)}
    return told | more | {"software": software}


def parts_of(model: "MetaQuery") -> dict[str, str]:
    """The sha256 of a release's own tensors, and of the frozen parts it stands on."""
    from model.assets import fingerprint
    from model.store import frozen_parts

    frozen = {name: facts["sha256"] for name, facts in frozen_parts(model).items()}
    return {"release": fingerprint(model.own_tensors())} | frozen
