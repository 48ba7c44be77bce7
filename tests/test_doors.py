import subprocess
import sys


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.split()
    )


def test_the_engine_imports_neither_lightning_nor_a_model_library():
    loaded = imported_by(
        "import lightning_nas, lightning_nas.supernet, lightning_nas.costs, lightning_nas.study"
    )
    assert loaded.isdisjoint({"pytorch_lightning", "lightning", "timm", "transformers", "wandb"})


def test_the_callbacks_are_part_of_the_package_and_bring_lightning():
    assert "pytorch_lightning" in imported_by("import lightning_nas.callbacks")
