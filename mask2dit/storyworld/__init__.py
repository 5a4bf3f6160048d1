"""A small synthetic world of stories, in which everything that a model may get right or wrong can be measured from pixels.

A story has one to three actors, a setting and scenes; each scene has a caption in the method's form. Semantic accuracy
measures the attributes that captions name (shape, colour, accessory, action, setting). Visual consistency measures those that
captions never name and that stay the same through a story (`Identity`): only other scenes show them.
"""
