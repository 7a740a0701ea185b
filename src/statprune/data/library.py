"""The source of Python's standard library: text that every Python has."""

import sysconfig
from pathlib import Path

from statprune.errors import CalibrationError


def standard_library_text(max_characters: int | None = None) -> tuple[str, str]:
    """Source text of Python's standard library: (training, held out), split by module, every tenth module held out.

    Every Python has it, so a demonstration needs no network and no file.

    Raises:
        CalibrationError: this Python has no source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(
        path for path in root.rglob("*.py")
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"} & set(path.relative_to(root).parts)
    )  # fmt: skip
    texts = []
    for module in modules:
        try:
            texts.append(module.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue  # a few modules are written in other encodings on purpose; one module more or less is no matter
    if not texts:
        raise CalibrationError(f"No Python source under {root}: this Python was installed without it.")
    held_out, training = "\n\n".join(texts[::10]), "\n\n".join(text for i, text in enumerate(texts) if i % 10)
    return training[:max_characters], held_out[:max_characters]
