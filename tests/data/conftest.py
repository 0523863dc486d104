from hypothesis import settings

# The first example of a test pays for imports and caches, and machines that test are busy.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
