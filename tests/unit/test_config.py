# SPDX-License-Identifier: GPL-2.0-or-later
"""The pillar: what passes, what is refused and in which words."""

import dataclasses
from pathlib import Path

import jinja2
import pytest
import yaml
from salt.exceptions import CommandExecutionError, SaltInvocationError

REPO = Path(__file__).resolve().parents[2]
FIXTURES = REPO / "tests" / "fixtures"
BAD = sorted((FIXTURES / "pillar").glob("*.yaml"))
GOOD = sorted((FIXTURES / "settings").glob("*.yaml"))


def read(path):
    return yaml.safe_load(path.read_text())


@pytest.fixture
def config(world):
    return world.module("ramboot_config")


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_each_bad_pillar_is_refused_in_these_words(config, path):
    case = read(path)

    assert config.faults(case["ramboot"]) == case["faults"]
    with pytest.raises(SaltInvocationError) as refused:
        config.load(case["ramboot"])
    assert str(refused.value) == "\n".join(case["faults"])


def test_a_program_is_found_by_its_better_name_whatever_the_path_is(world, config, monkeypatch):
    monkeypatch.setenv("PATH", "")
    names = ["grub2-mkconfig", "grub-mkconfig"]
    assert config.command(names) is None
    world.write("/usr/sbin/grub2-mkconfig", mode=0o644)
    world.write("/usr/sbin/grub-mkconfig", mode=0o755)
    assert config.command(names) == f"{world.root}/usr/sbin/grub-mkconfig"
    better = world.write("/bin/grub2-mkconfig", mode=0o755)
    assert config.command(names) == str(better)


def test_the_backends_of_a_pillar_are_those_that_any_of_its_keys_names(world, config):
    assert config.backends() == ["zram"]
    world.pillar["ramboot"] = {"boot": {"mode": "image", "backend": "overlay"}}
    assert config.backends() == ["image", "overlay", "zram"]
    other = {"boot": {"mode": "off", "backend": "tmpfs"}, "grub": {"entries": ["snapshot"]}}
    assert config.backends(config.load(other)) == ["snapshot", "tmpfs"]


def test_defaults_are_parsed_once_and_nobody_can_spoil_them(world, config):
    asked = []
    world.salt["cp.cache_file"] = lambda *path, **env: asked.append(path) or world.cache_file(*path)
    config.defaults()["paths"].clear()
    config.defaults()["ramboot"]["qubes"]["templates"]["mine"] = {}
    config.paths()["commands"].clear()
    config.load()["qubes"]["app_qubes"]["mine"] = {}
    assert config.paths() == world.paths
    assert config.load()["qubes"]["templates"] == config.load()["qubes"]["app_qubes"] == {}
    assert asked == [("salt://ramboot/defaults.yaml",)]


def test_bad_pillars_cover_every_key(config):
    """A key that can be set has at least one fixture that sets it wrongly."""
    told = "\n".join(fault for path in BAD for fault in read(path)["faults"])
    for section, allowed in config.defaults()["allowed"].items():
        for key in (
            [f"{section}:{name}" for name in allowed] if "kind" not in allowed else [section]
        ):
            assert f"ramboot:{key}: " in told


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_good_pillar_gives_the_stored_settings(config, path):
    case = read(path)
    pillar = read(REPO / case["file"])["ramboot"] if "file" in case else case["ramboot"]

    assert config.faults(pillar) == []
    assert config.load(pillar) == case["settings"]


def test_without_an_argument_the_minions_pillar_counts(config, world):
    world.pillar["ramboot"] = {"swap": "keep"}
    assert config.load()["swap"] == "keep"
    world.pillar["ramboot"] = {"swap": "kept"}
    assert config.faults() == ["ramboot:swap: 'kept' is not allowed; allowed: session, off or keep"]


def test_pillar_example_shows_every_key_at_its_default(config):
    shown = read(REPO / "pillar.example")
    assert shown == {"ramboot": config.defaults()["ramboot"]}


@pytest.mark.parametrize("edge", [0, 3600])
def test_both_ends_of_a_range_pass(config, edge):
    assert config.load({"boot": {"timeout_s": edge}})["boot"]["timeout_s"] == edge


@pytest.mark.parametrize(
    "pattern",
    [
        "/data",
        "/home/user/Videos",
        "/home/[ab]",
        "/var/log/*",
        "/usr/share/doc/*",
        "/var/lib/qubes/appvms/*",
    ],
)
def test_part_of_the_root_may_stay_behind(config, pattern):
    assert config.faults({"copy": {"exclude": [pattern]}}) == []


def test_settings_cannot_be_changed(config):
    settings, faults = config._parse({})
    assert faults == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.boot.mode = "zram"
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.swap = "off"


def test_defaults_that_are_not_served_are_named(config, world):
    world.salt["cp.cache_file"] = lambda path, saltenv: False
    with pytest.raises(CommandExecutionError) as missing:
        config.defaults()
    assert str(missing.value) == "salt://ramboot/defaults.yaml is not in file_roots of env base"


def render(settings):
    source = (REPO / "ramboot/initramfs/files/ramboot.conf.j2").read_text()
    return (
        jinja2.Environment(keep_trailing_newline=True).from_string(source).render(settings=settings)
    )


def test_boot_config_has_every_setting_in_its_fixed_order(config):
    settings = config.load({"copy": {"exclude": ["/a", "/b/*"]}, "zram": {"size_mib": 4096}})

    assert render(settings).splitlines()[1:] == [
        "version=1",
        "mode=ask",
        "backend=zram",
        "default=n",
        "timeout_s=30",
        "disk=attached",
        "swap=session",
        "zram_algorithm=auto",
        "zram_size_mib=4096",
        "tmpfs_size_mib=auto",
        "snapshot_store_mib=auto",
        "image_stale=rebuild-first",
        "reserve_mib=1024",
        "headroom_mib=1024",
        "copy_timeout_s=1800",
        "exclude=/a",
        "exclude=/b/*",
    ]


def test_boot_config_begins_with_its_origin_and_ends_with_a_line_end(config):
    text = render(config.load({"copy": {"exclude": []}}))
    assert text.startswith("# Written by Salt")
    assert text.endswith("copy_timeout_s=1800\n")
