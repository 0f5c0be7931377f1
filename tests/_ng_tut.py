import warnings,sys,json; warnings.simplefilter("error")
from tests.site import tutorials as t
for n in sys.argv[1:]:
    s=t.FOLDER/f"{n}.py"
    t.keep(s)
    for o in json.loads(t.kept(s).read_text()):
        if o["printed"] or o["pictures"]: print(o["printed"], o["pictures"])
