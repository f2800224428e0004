"""Runs the notebooks beside this file and stores their outputs, small: make notebooks."""

import base64
import io
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

COLOURS = 48  # of a stored figure


def smaller(png: str) -> str:
    """A PNG (base64) with few colours."""
    stream = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        few = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def tidy(book: nbformat.NotebookNode) -> None:
    """Leaves values and figures: logs and progress bars name this machine's folders."""
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                one
                for one in cell.outputs
                if one.output_type == "execute_result" or "image/png" in one.get("data", {})
            ]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])


def main() -> None:
    """Stops at the first notebook that fails, which stays as it was."""
    folder = Path(__file__).parent
    for path in sorted(folder.glob("*.ipynb")):
        book = nbformat.read(path, as_version=4)
        about = dict(book.metadata)
        NotebookClient(
            book, timeout=None, record_timing=False, resources={"metadata": {"path": str(folder)}}
        ).execute()
        book.metadata = about  # without the versions of this machine
        tidy(book)
        nbformat.write(book, path)


if __name__ == "__main__":
    main()
