"""Units into any network that is there already: find the places, attach, detach."""
