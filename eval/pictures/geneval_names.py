"""The 80 object classes of COCO in their order, under the names that GenEval's prompts use.

Detectors call some of them otherwise ("mouse", "tv", "motorbike", "sofa"), so classes are mapped by number. The names
and the ten colours are those of GenEval (Ghosh, Hajishirzi, Schmidt 2023, arXiv 2310.11513; MIT licence).
"""

CLASSES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(",")
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# COCO's 91 category numbers leave these out; torchvision and other detectors count with them.
_UNUSED_NUMBERS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
CATEGORY_NUMBERS = tuple(number for number in range(1, 91) if number not in _UNUSED_NUMBERS)

Box = tuple[float, float, float, float]
"""Of an object: x1, y1, x2, y2 in pixels, x2 and y2 exclusive."""
