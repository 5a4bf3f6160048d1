"""A small synthetic world of stories, in which everything that a model may get right or wrong can be measured from pixels.

A story has one to three actors, a setting and scenes; each scene has a caption in the method's form. What the captions name
(shape, colour, accessory, action, setting) is what semantic accuracy is about. What they never name, though it stays the same
through a story (`Identity`), is what visual consistency is about: only other scenes can tell it.
"""
