"""The words that captions of sprites have beside those of the postcards. `NEW` ones are never trained on."""

# Of each style: after a comma, before "of", and as an adjective.
STYLES = {
    "flat": (
        ("flat illustration", "flat design", "vector art", "flat style", "flat vector"),
        ("a flat illustration", "a flat icon", "vector art", "a flat drawing"),
        ("flat",),
    ),
    "3d": (
        ("3d render", "3d", "3d style", "glossy 3d", "3d model"),
        ("a 3d render", "a 3d model", "a glossy 3d picture", "a 3d rendering"),
        ("3d", "glossy 3d"),
    ),
    "noto": (
        ("cartoon", "cartoon style", "cartoon drawing"),
        ("a cartoon", "a cartoon drawing", "a cartoon picture"),
        ("cartoon",),
    ),
    "twemoji": (
        ("clip art", "clipart", "simple clip art"),
        ("clip art", "a piece of clip art", "simple clip art"),
        ("clip-art",),
    ),
}
NEW_STYLES = {
    "flat": ("in flat style", "2d flat design", "as a flat vector graphic"),
    "3d": ("in 3d", "rendered in 3d", "as a 3d object"),
    "noto": ("as a cartoon", "in cartoon style"),
    "twemoji": ("as clip art", "clip art style"),
}
POSTCARD = ("postcard style", "postcard", "in postcard style")

SIZES = {"small": ("small", "small", "little", "tiny"), "big": ("big", "big", "large", "huge")}

# {} is the background's colour.
PLAIN = (
    *("on a {} background", "on a {} background", "on a plain {} background", "on {}"),
    *("with a {} background", "in front of a {} background", "against a {} background"),
)
NEW_PLAIN = ("isolated on a {} background", "on a solid {} background", "on a {} backdrop")
PLAIN_TAGS = ("{} background", "plain {} background")
PLAIN_FIRST = ("a {} background with", "a plain {} background with")
TABLE = ("on a table", "on the table", "on a wooden table", "lying on a table", "standing on a table")
NEW_TABLE = ("on a wooden desk", "on top of a table")
TABLE_TAGS = ("table", "wooden table")
TABLE_FIRST = ("a table with", "a wooden table with")
NEW_OPENINGS = ("show me", "i want", "please draw", "a cute picture of", "draw")

# Other names that take no article.
MASS = (
    *("cheese", "french fries", "coffee", "tea", "wine", "milk", "beer", "bread", "soup", "salad", "rice"),
    *("noodles", "spaghetti", "popcorn", "corn", "soap", "butter", "bacon", "coral", "headphones"),
    *("spectacles", "eyeglasses", "shades", "Saturn"),
)
