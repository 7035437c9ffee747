"""W&B, the cache of Hugging Face, and what the recipe names: without network, and without showing a key."""

from __future__ import annotations

import netrc
import os
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

from mirage_dist.doctor.checks import Context, Verdict, failed, not_here, ok, warning
from mirage_dist.schema import ConfigError

GIB = 1 << 30
HOST = "https://api.wandb.ai"
# What W&B's client takes for a key: a part before the first dash, and 40 or more letters, digits, _ and -; or a token
# of three parts (wandb.sdk.lib.wbauth.validation of 0.31).
KEY = re.compile(r"(?:[^-]*-)?[\w-]{40,}|[\w-]+\.[\w-]+\.[\w-]+")


def login() -> tuple[str | None, str]:
    """Where W&B's client finds its key (None: nowhere), and what is wrong with it (empty: nothing).

    The order is the client's own: the environment, then the netrc file's entry for the server.
    """
    if key := os.environ.get("WANDB_API_KEY"):
        if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
            return "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE is set too, which W&B refuses"
        return "WANDB_API_KEY", "" if KEY.fullmatch(key) else "it does not have the form of a key"
    if file := os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "WANDB_IDENTITY_TOKEN_FILE", "" if Path(file).is_file() else "the file does not exist"
    given = os.environ.get("NETRC")
    place = Path(given).expanduser() if given else Path("~/.netrc").expanduser()
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or HOST).netloc
    try:
        entry = netrc.netrc(str(place)).authenticators(server)
    except FileNotFoundError:
        return None, ""
    except netrc.NetrcParseError as error:
        return str(place), f"line {error.lineno} of it cannot be read"
    except OSError as error:
        return str(place), f"it cannot be read ({error.strerror})"
    if entry is None:
        return None, ""
    return str(place), "" if KEY.fullmatch(entry[2] or "") else "it does not have the form of a key"


def wandb(context: Context) -> Verdict:
    mode = None if context.recipe is None else context.recipe.monitor.wandb
    source, fault = login()
    values = {"mode": mode, "login": source, "fault": fault or None}
    if mode == "off":
        return ok("off in the recipe (monitor.wandb)", **values)
    if mode == "offline":
        return ok("offline in the recipe; `wandb sync` sends its records later", **values)
    remedy = "export WANDB_API_KEY in the job's environment, or `wandb login` once; or monitor.wandb=offline"
    if fault:
        return (warning if mode is None else failed)(f"the key of {source} is of no use: {fault}", remedy, **values)
    if source is None:
        if mode == "online":
            return failed("monitor.wandb=online, and no key is here", remedy, **values)
        return not_here("no key; monitor.wandb=offline needs none", remedy, **values)
    return ok(f"a key by {source} (not shown, and not tried: that needs the network)", **values)


def cache(context: Context) -> Verdict:
    """Where models and data sets of the hub are looked for, whether that is there, and whether downloads are tried."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    offline = constants.HF_HUB_OFFLINE
    hub = _hub_names(context)
    given = {
        name: os.environ.get(name) for name in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    }
    values = {"folder": str(folder), "offline": offline, **given}
    how = "offline: nothing is downloaded" if offline else "online: missing files are downloaded"
    if not folder.is_dir():
        text = f"{folder} does not exist; {how}"
        if hub and offline:
            return failed(
                f"{text}; the recipe names {hub[0]}",
                "export HF_HOME to the cache that all nodes see, or download it on a node with internet",
                **values,
            )
        return ok(text, **values)
    free = shutil.disk_usage(folder).free
    text = f"{folder}, {free / GIB:.0f} GiB free; {how}"
    if not os.access(folder, os.W_OK) and not offline:
        return warning(f"{text}, but the folder is not writable", "HF_HUB_OFFLINE=1, or another HF_HOME", **values)
    if "SLURM_JOB_ID" in os.environ and not offline:
        return warning(
            f"{text}; on a compute node without internet each look-up waits for its timeout",
            "HF_HUB_OFFLINE=1, as launch/node.sh sets it",
            **values,
        )
    return ok(text, **values)


def _hub_names(context: Context) -> list[str]:
    """What the recipe takes from the hub: a model that is no folder, data by hf://."""
    if context.recipe is None:
        return []
    sources = [source.path for given in context.recipe.data.streams.values() for source in given]
    model = context.recipe.model.path
    return [*([] if os.path.lexists(model) else [model]), *(s for s in sources if s.startswith("hf://"))]


def inputs(context: Context) -> Verdict:
    """Whether this host sees the recipe's model and data files; it does not read them (see `mirage train --check`)."""
    if context.recipe is None:
        return not_here("no recipe", "--recipe CONFIG")
    from mirage_dist import inputs as worlds
    from mirage_dist.model import directory

    if missing := worlds.missing(context.recipe):
        return ok(f"{missing[0]} is made at the start of the run")
    try:
        model = directory.check(context.recipe.model.path)
    except ConfigError as error:
        return failed(str(error), "put it where all nodes see it, or change model.path")
    for name, given in context.recipe.data.streams.items():
        for source in given:
            if "://" not in source.path and not os.path.exists(source.path):
                return failed(
                    f"data.streams.{name}: {source.path} is not there",
                    "put it where all nodes see it; docs/get_data.md",
                )
    return ok(f"{model} and {sum(map(len, context.recipe.data.streams.values()))} data files")
