"""Generates vmprobe.v1 from the contract, which is in the tree that this package is built from."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONTRACT = Path(__file__).resolve().parents[2] / "api" / "proto"


class Generate(build_py):
    """Adds the generated modules, and their types, to the package."""

    def run(self) -> None:
        super().run()
        from grpc_tools import protoc

        out = Path(self.build_lib)
        (out / "vmprobe" / "v1").mkdir(parents=True, exist_ok=True)
        (out / "vmprobe" / "v1" / "__init__.py").touch()
        files = sorted(str(path) for path in (CONTRACT / "vmprobe" / "v1").glob("*.proto"))
        outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        if not files or protoc.main(["protoc", f"--proto_path={CONTRACT}", *outputs, *files]) != 0:
            raise SystemExit(f"The contract in {CONTRACT} cannot be compiled")


setup(cmdclass={"build_py": Generate})
