"""The categories of COCO, whose ids are the classes of the released detector."""

_NAMES = {
    1: "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant",
    13: "stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe",
    27: "backpack umbrella",
    31: "handbag tie suitcase frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard "
    "tennis_racket bottle",
    46: "wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake "
    "chair couch potted_plant bed",
    67: "dining_table",
    70: "toilet",
    72: "tv laptop mouse remote keyboard cell_phone microwave oven toaster sink refrigerator",
    84: "book clock vase scissors teddy_bear hair_drier toothbrush",
}


def coco_class_names() -> list[str]:
    """Name by class, 91 of them; "" for 0 and for the gaps in COCO's ids."""
    names = [""] * 91
    for first, words in _NAMES.items():
        for number, word in enumerate(words.split(), start=first):
            names[number] = word.replace("_", " ")
    return names
