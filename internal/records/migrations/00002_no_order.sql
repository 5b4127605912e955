-- Volumes are sorted by who lists them; the index cost every creation a page.
DROP INDEX volume_newest;
