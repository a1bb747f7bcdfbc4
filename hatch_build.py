"""The compiled build: a wheel in which what every record goes through is machine code. Made only where it is asked for.

1. ``TIERSTREAM_COMPILE=1`` asks, of any builder of wheels. Without it nothing here does anything and the wheel is pure
   Python; an editable installation always is.
2. mypyc, which comes with mypy, type-checks :data:`COMPILED` as they stand and writes them as one C extension.
3. The C compiler of this Python builds that, and for each module a stub through which it is imported.
4. Both go into the wheel beside the sources. Python prefers an extension module to a source of the same name; the wheel
   is for this version of Python on this platform.

No compiler, no headers or no mypyc, where a compiled wheel was asked for: the build ends and says so.

Extension modules exist in wheels only, never beside the sources of a checkout, so none can be older than its source.

Compiled functions have no frames: samplers do not see them, nor does who asks a coroutine where it waits. So nothing
that waits is compiled: a process that hangs has to tell where its tasks are. ``docs/cost.md`` has what it brings.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any, NoReturn

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

WANTED = "TIERSTREAM_COMPILE"

COMPILED = ("consumer.codec", "consumer.prescan")
"""Modules to be compiled: into one library, within which they call each other as C functions do."""

GROUP = "tierstream"
"""What the library is called after. It lies beside the package: mypyc tells from that where its modules are."""

REQUIREMENTS = ("mypy>=2.4,<2.5",)
"""For builders that make an environment of their own. Only within a series: mypyc without setuptools is not public."""

FLAGS = ("-fPIC", "-O2", "-g0", "-w")
"""Beside those of this Python. Warnings about generated code tell nobody anything."""


class CompiledBuild(BuildHookInterface[Any]):
    """Adds extension modules to a wheel, where that is asked for."""

    PLUGIN_NAME = "custom"
    _folder: Path | None = None

    def dependencies(self) -> list[str]:
        """Return what a builder has to install first."""
        return [*REQUIREMENTS] if _wanted() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the wheel is put together; *version* is ``editable`` where there will be none."""
        if not _wanted() or version == "editable":
            return
        self._folder = Path(tempfile.mkdtemp(prefix="tierstream-compile-"))
        for library in compile_modules(Path(self.root), self._folder):
            build_data["force_include"][str(library)] = str(library.relative_to(self._folder))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what the wheel has been made of."""
        del version, build_data, artifact_path
        if self._folder is not None:
            shutil.rmtree(self._folder)


def _wanted() -> bool:
    return os.environ.get(WANTED) == "1"


def compile_modules(root: Path, folder: Path) -> list[Path]:
    """Compile :data:`COMPILED` of the checkout *root*; return the libraries, which lie in *folder* as in the wheel.

    Raises:
        SystemExit: they cannot be compiled here.
    """
    linker = shlex.split(sysconfig.get_config_var("LDSHARED") or "cc -shared")
    if "CC" in os.environ:
        linker[:1] = shlex.split(os.environ["CC"])
    headers, suffix = Path(sysconfig.get_path("include")), sysconfig.get_config_var("EXT_SUFFIX")
    if shutil.which(linker[0]) is None:
        sys.exit(f"{WANTED}=1 needs a C compiler, and there is no {linker[0]}\nhint: apt install gcc, or CC=...")
    if not (headers / "Python.h").exists():
        sys.exit(f"{WANTED}=1 needs the headers of Python: {headers}/Python.h\nhint: apt install python3-dev")
    shutil.copytree(root / "consumer", folder / "consumer", ignore=shutil.ignore_patterns("__pycache__"))
    # What the package offers to its users names everything, and every vendor: mypy would read all of it.
    (folder / "consumer" / "__init__.py").write_text("", encoding="utf-8")
    runtime = _write_c(folder)
    python_flags = shlex.split(sysconfig.get_config_var("CFLAGS") or "")
    libraries = []
    for source in sorted(folder.glob("**/*.c")):
        library = source.with_name(source.stem.replace(f"__native_{GROUP}", f"{GROUP}__mypyc") + suffix)
        places = (f"-I{headers}", f"-I{runtime}", f"-I{folder}")
        command = [*linker, *python_flags, *FLAGS, *places, str(source), "-o", str(library)]
        if subprocess.run(command, check=False).returncode != 0:
            sys.exit(f"the C compiler has failed: {shlex.join(command)}")
        libraries.append(library)
    return libraries


def _write_c(folder: Path) -> Path:
    """Write C sources to *folder*, those of a module beside it; return where the headers are that all of them need."""
    try:
        import mypyc
        from mypy.build import BuildSource
        from mypy.errors import CompileError
        from mypy.fscache import FileSystemCache
        from mypy.options import Options
        from mypyc.codegen import emitmodule
        from mypyc.common import shared_lib_name
        from mypyc.errors import Errors
        from mypyc.namegen import exported_name
        from mypyc.options import CompilerOptions
    except ImportError as error:
        sys.exit(f"{WANTED}=1 needs mypyc: {error}\nhint: pip install '{REQUIREMENTS[0]}'")
    options = Options()
    options.python_version = sys.version_info[:2]
    options.export_types = options.preserve_asts = options.ignore_missing_imports = True
    options.incremental = False
    options.per_module_options = {module: {"mypyc": True} for module in COMPILED}
    compiling, errors = CompilerOptions(target_dir=str(folder)), Errors(options)
    try:
        with chdir(folder):  # paths stand in tracebacks as they are given here
            sources = [BuildSource(f"{module.replace('.', '/')}.py", module) for module in COMPILED]
            groups: emitmodule.Groups = [(sources, GROUP)]
            checked = emitmodule.parse_and_typecheck(sources, options, compiling, groups, FileSystemCache())
            if checked.errors:
                _refuse(checked.errors)
            _, written, _ = emitmodule.compile_modules_to_c(checked, compiling, errors, groups)
            if errors.num_errors:
                _refuse(errors.new_messages())
    except CompileError as error:
        _refuse(error.messages)
    for name, text in (file for group in written for file in group):
        (folder / name).write_text(text, encoding="utf-8")
    runtime = Path(mypyc.__file__).parent / "lib-rt"
    stub = (runtime / "module_shim.tmpl").read_text(encoding="utf-8")
    for module in COMPILED:
        path, name = folder / f"{module.replace('.', '/')}.c", module.rpartition(".")[2]
        text = stub.format(modname=name, libname=shared_lib_name(GROUP), full_modname=exported_name(module))
        path.write_text(text, encoding="utf-8")
    return runtime


def _refuse(messages: list[str]) -> NoReturn:
    sys.exit("\n".join(["mypyc cannot compile this:", *messages]))
