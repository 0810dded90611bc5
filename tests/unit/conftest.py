# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures for the unit tests: the project's own modules in a stand-in for Salt's loader.

`world` holds what the loader would inject. Its `salt` dictionary is strict: a function that nobody
put there is a KeyError. The whole of `defaults.yaml` is real, but each of its paths lies below
`world.root`, a directory of the test.

    def test_claim(world, test_mode):        # runs twice, with test=True and without
        world.salt["cmd.run_all"] = fake
        world.module("ramboot_swap")         # its functions are now in world.salt
        ret = world.state("ramboot_swap").off("swap")
        assert ret["result"] is (None if test_mode else True)
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pickle
import sys
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
FIXTURES = REPO / "tests" / "fixtures"


def load_module(path, *, salt=None, opts=None, states=None, grains=None, pillar=None, context=None):
    """Import REPO/path under its own name with Salt's dunders set.

    Not in sys.modules while it runs, as in Salt's loader: a dataclass then cannot be combined with
    `from __future__ import annotations`.
    """
    path = REPO / path
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    module.__salt__ = {} if salt is None else salt
    module.__states__ = {} if states is None else states
    module.__opts__ = {"test": False, "saltenv": "base"} if opts is None else opts
    module.__grains__ = {} if grains is None else grains
    module.__pillar__ = {} if pillar is None else pillar
    module.__context__ = {} if context is None else context
    module.__env__ = "base"
    spec.loader.exec_module(module)
    if hasattr(module, "yaml"):
        module.yaml = SimpleNamespace(load=parsed)
    return module


@functools.cache
def _parsed(text: str, loader: type) -> bytes:
    return pickle.dumps(yaml.load(text, Loader=loader))


def parsed(stream, Loader):  # noqa: N803
    """yaml.load, with which most tests would spend half of their time: a text is parsed once."""
    return pickle.loads(_parsed(stream.read(), Loader))


def public_functions(module: ModuleType) -> dict[str, FunctionType]:
    """The functions that Salt's loader would publish, under the names it would use."""
    alias = getattr(module, "__func_alias__", {})
    return {
        alias.get(name, name): value
        for name, value in vars(module).items()
        if isinstance(value, FunctionType)
        and not name.startswith("_")
        and value.__module__ == module.__name__
    }


def moved_below(value, root: Path):
    """The same structure with each absolute path in it moved below root."""
    if isinstance(value, dict):
        return {key: moved_below(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [moved_below(item, root) for item in value]
    if isinstance(value, str) and value.startswith("/"):
        return f"{root}{value}"
    return value


def unchanged(path: Path) -> tuple[int, ...]:
    """What stays the same while nobody changes a file. Not its time of access: reading sets it."""
    info = path.lstat()
    return (
        info.st_ino,
        info.st_mode,
        info.st_uid,
        info.st_gid,
        info.st_size,
        info.st_mtime_ns,
        info.st_ctime_ns,
    )


ROOT = "/@root@"


@functools.cache
def moved_defaults() -> str:
    """defaults.yaml with each of its paths below ROOT."""
    defaults = yaml.safe_load((REPO / "ramboot/defaults.yaml").read_text())
    defaults["paths"] = moved_below(defaults["paths"], Path(ROOT))
    return yaml.safe_dump(defaults, sort_keys=False)


class World:
    """What Salt's loader gives to a module; `module()` and `state()` load ours into it."""

    def __init__(self, root: Path, cache: Path, test: bool):
        self.root = root
        self.cache = cache
        self.opts = {
            "test": test,
            "saltenv": "base",
            "file_client": "local",
            "cachedir": str(cache),
        }
        self.salt: dict = {"cp.cache_file": self.cache_file}
        self.states: dict = {}
        self.grains: dict = {}
        self.pillar: dict = {}
        self.context: dict = {}

    def cache_file(self, path, saltenv="base", **_kwargs):
        """cp.cache_file: our tree is the file server; defaults.yaml gets the test's paths."""
        assert saltenv == "base", saltenv
        source = REPO / path.removeprefix("salt://")
        if not source.is_file():
            return False
        if path != "salt://ramboot/defaults.yaml":
            return str(source)
        target = self.cache / "defaults.yaml"
        if not target.exists():
            target.write_text(moved_defaults().replace(ROOT, str(self.root)))
        return str(target)

    @property
    def paths(self) -> dict:
        """`paths` of defaults.yaml as the modules see it here."""
        with open(self.cache_file("salt://ramboot/defaults.yaml"), encoding="utf-8") as stream:
            return parsed(stream, yaml.SafeLoader)["paths"]

    def _load(self, folder: str, name: str, into: dict) -> ModuleType:
        module = load_module(
            f"{folder}/{name}.py",
            salt=self.salt,
            opts=self.opts,
            states=self.states,
            grains=self.grains,
            pillar=self.pillar,
            context=self.context,
        )
        virtual = getattr(module, "__virtualname__", name)
        for function, value in public_functions(module).items():
            into[f"{virtual}.{function}"] = value
        return module

    def module(self, name: str) -> ModuleType:
        """Load _modules/NAME.py and publish its functions in `salt`."""
        return self._load("_modules", name, self.salt)

    def state(self, name: str) -> ModuleType:
        """Load _states/NAME.py and publish its functions in `states`."""
        return self._load("_states", name, self.states)

    def write(self, path: str, text: str | bytes = "", mode: int = 0o644) -> Path:
        """Make a file of the fake system (path as in dom0) with its directories."""
        target = Path(f"{self.root}{path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text if isinstance(text, bytes) else text.encode())
        target.chmod(mode)
        return target


@pytest.fixture(params=[False, True], ids=["apply", "test=True"])
def test_mode(request):
    """Run the test with Salt's test mode off and on."""
    return request.param


@pytest.fixture
def world(request, tmp_path):
    """An empty system with Salt around it; honours `test_mode` when the test asks for that too."""
    test = request.getfixturevalue("test_mode") if "test_mode" in request.fixturenames else False
    root, cache = tmp_path / "root", tmp_path / "cache"
    root.mkdir()
    cache.mkdir()
    return World(root, cache, test)


@pytest.fixture
def load():
    """`load("_modules/NAME.py", salt={...})`: one module with exactly the dunders given."""
    return load_module


STANDIN = REPO / "tests" / "standin"


def import_standin(monkeypatch):
    """`import qubesadmin` gives the stand-in, fresh; the real one is back after the test."""
    for name in [key for key in sys.modules if key.partition(".")[0] == "qubesadmin"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(STANDIN))
    module = importlib.import_module("qubesadmin")
    for name in [key for key in sys.modules if key.partition(".")[0] == "qubesadmin"]:
        # monkeypatch takes out again what was not there before
        monkeypatch.setitem(sys.modules, name, sys.modules.pop(name))
    return module


def populate(qubesd, below):
    """What a fresh Qubes has, in the stand-in's world: pools, a template, a netvm, a dvm.

    below
        the directory that stands for /
    """
    qubesd.base = f"{below}/var/lib/qubes"
    qubesd.add_pool("varlibqubes", "file", dir_path=f"{below}/var/lib/qubes", revisions_to_keep=1)
    qubesd.add_pool("linux-kernel", "linux-kernel", dir_path=f"{below}/var/lib/qubes/vm-kernels")
    qubesd.add_pool("vm-pool", "lvm_thin", volume_group="qubes_dom0", thin_pool="vm-pool")
    qubesd.system["default_pool"] = "vm-pool"
    app = sys.modules["qubesadmin"].Qubes()
    app.add_new_vm("TemplateVM", "debian-12-xfce", "black")
    qubesd.fill("debian-12-xfce", "root", 3 << 20)
    qubesd.fill("debian-12-xfce", "private", 1 << 16)
    app.default_template = "debian-12-xfce"
    net = app.add_new_vm("AppVM", "sys-net", "red", template="debian-12-xfce")
    net.provides_network, net.netvm = True, None
    app.default_netvm = "sys-net"
    dvm = app.add_new_vm("AppVM", "default-dvm", "red", template="debian-12-xfce")
    dvm.template_for_dispvms = True
    app.default_dispvm = "default-dvm"
    qubesd.calls.clear()


@pytest.fixture
def qubesd(world, monkeypatch):
    """The stand-in for qubesd with what a fresh Qubes has; the seam to it is in `world.salt`."""
    module = import_standin(monkeypatch)
    populate(module.WORLD, world.root)

    def run_all(command, **_options):
        done = {"retcode": 0, "stdout": "", "stderr": ""}
        if command[0] == "stat" and not os.path.isdir(command[-1]):
            return {**done, "retcode": 1, "stderr": "No such file or directory"}
        if command[0] == "stat":
            done["stdout"] = f"{module.WORLD.born[command[-1]]:.3f}"
        return done

    world.salt["cmd.run_all"] = run_all
    world.module("ramboot_qubesadmin")
    return module.WORLD
