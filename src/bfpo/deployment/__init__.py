"""From a checkpoint to something that answers: exported files, a server, a repository on a hub."""
