"""Draws docs/architecture.svg: one block of Q-ViT, with the bits of every product.

    python docs/draw_architecture.py
"""
from pathlib import Path

PLAIN, QUANT, IRM, EDGE = '#f2f2f2', '#cfe3f7', '#fbe3bf', '#dcd3ee'
WIDTH, HEIGHT = 980, 560


def box(x: int, y: int, w: int, h: int, text: str, fill: str, note: str = '') -> str:
    lines = f'<text x="{x + w / 2}" y="{y + h / 2 + (0 if note else 5)}" class="t">{text}</text>'
    if note:
        lines += f'<text x="{x + w / 2}" y="{y + h / 2 + 16}" class="n">{note}</text>'
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="#444"/>{lines}'


def arrow(*points: tuple[int, int]) -> str:
    return f'<polyline points="{" ".join(f"{x},{y}" for x, y in points)}" class="a" marker-end="url(#head)"/>'


def label(x: int, y: int, text: str, kind: str = 'n') -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{text}</text>'


def drawing() -> str:
    top, low = 110, 390
    parts = [
        label(WIDTH // 2, 34, 'Q-ViT: one block, and what surrounds it', 'h'),
        # the way through the network
        box(20, top + 90, 110, 60, 'patch embed', EDGE, 'w8 a8'), arrow((130, top + 120), (160, top + 120)),
        # attention
        label(440, 78, 'Q-Attention', 'h2'), '<rect x="160" y="90" width="640" height="250" rx="10" class="frame"/>',
        box(175, top + 95, 90, 50, 'LayerNorm', PLAIN), arrow((265, top + 120), (285, top + 120)),
        box(285, top + 90, 80, 60, 'qkv', QUANT, 'w4 a4'),
        arrow((365, top + 120), (385, top + 120), (385, top + 35), (405, top + 35)),
        arrow((365, top + 120), (385, top + 120), (405, top + 120)),
        arrow((365, top + 120), (385, top + 120), (385, top + 195), (540, top + 195)),
        label(392, top + 25, 'q'), label(396, top + 112, 'k'), label(392, top + 187, 'v'),
        box(405, top + 10, 105, 50, 'IRM', IRM, 'LayerNorm(d)'),
        box(405, top + 95, 105, 50, 'IRM', IRM, 'LayerNorm(d)'),
        arrow((510, top + 35), (575, top + 35), (575, top + 58)),
        arrow((510, top + 120), (575, top + 120), (575, top + 98)),
        box(540, top + 58, 80, 40, 'q k^T', QUANT, 'a4 x a4'), arrow((620, top + 78), (640, top + 78)),
        box(640, top + 53, 70, 50, 'softmax', PLAIN), arrow((675, top + 103), (675, top + 175)),
        box(540, top + 175, 170, 40, 'A v', QUANT, 'a4 x a4'),
        arrow((710, top + 195), (725, top + 195), (725, top + 150)),
        box(725, top + 90, 65, 60, 'proj', QUANT, 'w4 a4'),
        arrow((790, top + 120), (825, top + 120)),
        '<circle cx="838" cy="230" r="13" class="sum"/>', label(838, 236, '+', 't'),
        arrow((145, 230), (145, 355), (838, 355), (838, 243)), label(480, 371, 'residual, float'),
        # distillation
        label(480, top - 6, 'DGD compares q and k after IRM with the teacher\u2019s, as N x N patterns'),
        # mlp
        label(480, 408, 'Q-MLP', 'h2'), '<rect x="240" y="418" width="480" height="80" rx="10" class="frame"/>',
        arrow((851, 230), (900, 230), (900, 458), (690, 458)),
        box(600, 433, 90, 50, 'LayerNorm', PLAIN), arrow((600, 458), (575, 458)),
        box(495, 433, 80, 50, 'fc1', QUANT, 'w4 a4'), arrow((495, 458), (475, 458)),
        box(365, 433, 110, 50, 'GELU, clip', PLAIN, '[-10, 10]'), arrow((365, 458), (345, 458)),
        box(260, 433, 85, 50, 'fc2', QUANT, 'w4 a4'), arrow((260, 458), (213, 458)),
        '<circle cx="200" cy="458" r="13" class="sum"/>', label(200, 464, '+', 't'),
        arrow((900, 458), (900, 520), (200, 520), (200, 471)), label(480, 536, 'residual, float'),
        arrow((187, 458), (140, 458)), box(20, low + 38, 120, 60, 'next block or', PLAIN, '2 heads, w8 a8'),
        # legend
        box(20, 60, 14, 14, '', QUANT), label(42, 72, 'quantized operands (w: weight, a: activation bits)', 'l'),
        box(20, 82, 14, 14, '', IRM), label(42, 94, 'rectifies', 'l'),
        box(20, 104, 14, 14, '', EDGE), label(42, 116, 'always 8 bits', 'l'),
        box(20, 126, 14, 14, '', PLAIN), label(42, 138, 'full precision', 'l'),
    ]
    style = ('text{font-family:Helvetica,Arial,sans-serif;fill:#222}.t{font-size:14px;text-anchor:middle}'
             '.n{font-size:12px;text-anchor:middle}.l{font-size:12px}.h{font-size:18px;text-anchor:middle}'
             '.h2{font-size:15px;text-anchor:middle;font-weight:bold}.a{fill:none;stroke:#444;stroke-width:1.4}'
             '.frame{fill:none;stroke:#999;stroke-dasharray:5 4}.sum{fill:#fff;stroke:#444}')
    head = ('<marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
            '<path d="M0,1L7,4L0,7z"/></marker>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">'
            f'<style>{style}</style><defs>{head}</defs><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
            + '\n'.join(parts) + '</svg>\n')


if __name__ == '__main__':
    Path(__file__).with_name('architecture.svg').write_text(drawing())
