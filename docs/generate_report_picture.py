"""Makes images/report.png of three sections of a report, by chromium.

`python docs/generate_report_picture.py RUN/report.html`
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

TARGET = Path(__file__).parent / "images" / "report.png"
WIDTH, HEIGHT = 1340, 1900
ONLY = "<style>section:not(#stages, #loss, #answers) { display: none }</style>"


def main() -> None:
    """Take the picture."""
    page = Path(sys.argv[1]).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        shown, picture = Path(folder, "page.html"), Path(folder, "page.png")
        shown.write_text(page.replace("</head>", f"{ONLY}</head>"), encoding="utf-8")
        command = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
        subprocess.run([*command, f"--screenshot={picture}", shown.as_uri()], check=True, capture_output=True)
        TARGET.parent.mkdir(exist_ok=True)
        # 256 colors are enough for a page, and take a third of the bytes.
        Image.open(picture).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(TARGET, optimize=True)
    print(f"{TARGET}: {TARGET.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
