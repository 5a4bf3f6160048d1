"""Stories: a title, a cast and scenes. Reading, checking and writing their files, and the names of actors in prompts."""

from mask2dit.stories.files import Fault, StoryError, read_stories, read_story, write_stories, write_story
from mask2dit.stories.story import ACTOR, Scene, Story, describe_actors, story_from

__all__ = [
    "ACTOR",
    "Fault",
    "Scene",
    "Story",
    "StoryError",
    "describe_actors",
    "read_stories",
    "read_story",
    "story_from",
    "write_stories",
    "write_story",
]
