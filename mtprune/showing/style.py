"""The style of a page: light and dark, phone and paper."""

__all__ = ["STYLE"]

STYLE = """
:root{color-scheme:light dark}
body{margin:0;background:Canvas}
.mtprune{--ink:#1c2430;--soft:#5a6675;--paper:#fff;--line:#d9dfe7;--c0:#0b3c6f;--c1:#2f7fc1;
--c2:#e08a1e;--c3:#8b93a0;--c4:#e9edf2;--s0:#0b3c6f;--s1:#c2570c;--s2:#1f7a4d;--s3:#8a2f8f;
--s4:#7a5c00;--s5:#3f4a57;color:var(--ink);background:var(--paper);
font:15px/1.5 system-ui,sans-serif;max-width:860px;margin:0 auto;padding:24px 20px}
@media (prefers-color-scheme:dark){.mtprune{--ink:#e8edf3;--soft:#a7b3c2;--paper:#14181d;
--line:#333c47;--c0:#9cc9f5;--c1:#4d93d6;--c2:#f0a548;--c3:#7d8794;--c4:#262d36;--s0:#9cc9f5;
--s1:#f39a5b;--s2:#6fd3a0;--s3:#d99be0;--s4:#e2c25c;--s5:#c6d0dc}}
.mtprune h1{font-size:30px;line-height:1.2;margin:0 0 4px}
.mtprune h2{font-size:19px;margin:34px 0 6px}
.mtprune h3{font-size:15px;margin:18px 0 4px}
.mtprune .lead{font-size:17px;margin:0 0 14px}
.mtprune .method{color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.mtprune .cards{display:flex;flex-wrap:wrap;gap:10px;margin:0 0 14px}
.mtprune .card{border:1px solid var(--line);border-radius:8px;padding:8px 14px;flex:1 1 150px}
.mtprune .card b{display:block;font-size:20px}
.mtprune .card span{color:var(--soft);font-size:13px}
.mtprune .picture{overflow-x:auto;margin:8px 0}
.mtprune svg{display:block;width:100%;min-width:600px;height:auto}
.mtprune svg text{font:12px system-ui,sans-serif;fill:var(--ink)}
.mtprune .c0{fill:var(--c0)}.mtprune .c1{fill:var(--c1)}.mtprune .c2{fill:var(--c2)}
.mtprune .c3{fill:var(--c3)}.mtprune .c4{fill:var(--c4)}
.mtprune .cell{fill:var(--c0);fill-opacity:calc(.04 + .42*var(--share));stroke:var(--line);
stroke-width:.5}
.mtprune .grid{fill:none;stroke:var(--line)}
.mtprune .mark{fill:var(--c2);fill-opacity:.25}
.mtprune .band{fill:var(--c3);fill-opacity:.3}
.mtprune .line{fill:none;stroke-width:2}
.mtprune .line.s0{stroke:var(--s0)}.mtprune .line.s1{stroke:var(--s1)}
.mtprune .line.s2{stroke:var(--s2)}.mtprune .line.s3{stroke:var(--s3)}
.mtprune .line.s4{stroke:var(--s4)}.mtprune .line.s5{stroke:var(--s5)}
.mtprune text.s0{fill:var(--s0)}.mtprune text.s1{fill:var(--s1)}.mtprune text.s2{fill:var(--s2)}
.mtprune text.s3{fill:var(--s3)}.mtprune text.s4{fill:var(--s4)}.mtprune text.s5{fill:var(--s5)}
.mtprune .box{overflow:auto;max-height:420px;border:1px solid var(--line);border-radius:8px;
margin:8px 0}
.mtprune table{border-collapse:collapse;width:100%;font-size:13px}
.mtprune caption{text-align:left;color:var(--soft);padding:6px 10px;position:sticky;left:0;
box-sizing:border-box;max-width:calc(100vw - 44px)}
.mtprune th,.mtprune td{padding:4px 10px;text-align:right;border-top:1px solid var(--line);
white-space:nowrap;background:none;color:inherit}
.mtprune thead th{position:sticky;top:0;background:var(--paper)}
.mtprune th:first-child{text-align:left}
.mtprune td:last-child{text-align:right}
.mtprune pre{overflow:auto;font-size:12px;border:1px solid var(--line);border-radius:8px;
padding:10px}
.mtprune .picture:focus-visible,.mtprune .box:focus-visible,
.mtprune pre:focus-visible{outline:3px solid var(--s1);
outline-offset:2px}
.mtprune .figures{display:flex;flex-wrap:wrap;gap:16px}
.mtprune figure{margin:0;max-width:100%}
.mtprune figcaption{font-size:12px;color:var(--soft);overflow-wrap:anywhere}
.mtprune .mask{image-rendering:pixelated;border:1px solid var(--line);max-width:100%}
.mtprune dt{font-weight:600}.mtprune dd{margin:0 0 8px;color:var(--soft)}
@media print{.mtprune{max-width:none;padding:0;--ink:#000;--paper:#fff}
.mtprune .box{max-height:none;overflow:visible;border:0}.mtprune table{font-size:9px}
.mtprune th,.mtprune td{padding:2px 4px;
white-space:normal}.mtprune .picture,.mtprune figure,.mtprune tr{break-inside:avoid}
.mtprune svg{min-width:0}.mtprune h2{break-after:avoid}}
"""
