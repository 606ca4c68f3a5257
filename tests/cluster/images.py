"""The images that the cluster's pods run, built once per recipe."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import rootfs, versions
from tests.cluster.layout import TEST_IMAGE, Layout
from tests.cluster.mounts import unmount_under
from tests.cluster.oci import ImageConfig, pack
from tests.cluster.shell import run
from tests.cluster.versions import Program

PAUSE_IMAGE = "docker.io/headway/pause:1"
_NOBODY = "65532:65532"
_PAUSE = """
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
static void leave(int number) { (void)number; exit(0); }
static void reap(int number) { (void)number; while (waitpid(-1, 0, WNOHANG) > 0) {} }
int main(void) {
    signal(SIGINT, leave);
    signal(SIGTERM, leave);
    signal(SIGCHLD, reap);
    for (;;) pause();
}
"""


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image and how its root file system is made."""

    file: str
    config: ImageConfig
    recipe: str
    """Changes whenever the image has to be built anew."""
    make: Callable[[Path], None]

    @property
    def digest(self) -> str:
        config = [self.config.name, self.config.user, *self.config.entrypoint, *self.config.environment.items()]
        return hashlib.sha256(json.dumps([self.recipe, config]).encode()).hexdigest()


def image_name(program: Program) -> str:
    return f"docker.io/headway/{program.name}:v{program.version}"


def all_images(layout: Layout) -> tuple[Image, ...]:
    in_pods = (versions.KUBERAY_OPERATOR, versions.KUEUE_MANAGER, versions.COREDNS_SERVER)
    return (_pause(), *(_program(layout, each) for each in in_pods), _test_image())


def build_images(layout: Layout) -> list[str]:
    """Build what is not there by its recipe, and say what that was."""
    layout.images.mkdir(parents=True, exist_ok=True)
    built = []
    for image in all_images(layout):
        stamp = layout.images / f"{image.file}.stamp"
        if archive(layout, image).exists() and stamp.exists() and stamp.read_text() == image.digest:
            continue
        print(f"Packing {image.config.name}", flush=True)
        root = layout.images / f"{image.file}.root"
        _remove(root)
        image.make(root)
        pack(root, archive(layout, image), config=image.config)
        _remove(root)
        stamp.write_text(image.digest)
        built.append(image.config.name)
    return built


def archive(layout: Layout, image: Image) -> Path:
    return layout.images / f"{image.file}.tar"


def _pause() -> Image:
    def make(root: Path) -> None:
        root.mkdir()
        run(["cc", "-x", "c", "-static", "-Os", "-o", str(root / "pause"), "-"], stdin=_PAUSE)

    config = ImageConfig(name=PAUSE_IMAGE, entrypoint=["/pause"], user=_NOBODY)
    return Image(file="pause", config=config, recipe=_PAUSE, make=make)


def _program(layout: Layout, program: Program) -> Image:
    def make(root: Path) -> None:
        root.mkdir()
        (root / "tmp").mkdir()
        (root / "tmp").chmod(0o1777)
        shutil.copy2(layout.program(program.name), root / "manager")

    config = ImageConfig(name=image_name(program), entrypoint=["/manager"], user=_NOBODY)
    return Image(file=program.name, config=config, recipe=program.stamp, make=make)


def _test_image() -> Image:
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    seen = python.stat()
    recipe = [
        *rootfs.DEBIAN_PACKAGES,
        sys.version,
        f"{python} {seen.st_size} {seen.st_mtime_ns}",
        *(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed")),
        Path(rootfs.__file__).read_text(),
    ]
    config = ImageConfig(
        name=TEST_IMAGE,
        user=f"{rootfs.USER_ID}:{rootfs.USER_ID}",
        environment=rootfs.environment(),
        working_directory=rootfs.HOME,
    )
    return Image(file="test", config=config, recipe="\n".join(recipe), make=rootfs.make)


def _remove(root: Path) -> None:
    # Where debootstrap was interrupted, this machine's /proc may still be mounted in it.
    unmount_under(root)
    if root.exists():
        shutil.rmtree(root)
