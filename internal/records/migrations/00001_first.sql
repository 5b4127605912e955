CREATE TABLE volume (
  id TEXT NOT NULL PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  kind TEXT NOT NULL,
  quota_mib BIGINT NOT NULL,
  capacity_bytes BIGINT NOT NULL,
  disk_format TEXT NOT NULL,
  disk_fstype TEXT NOT NULL,
  labels TEXT NOT NULL,
  created_ns BIGINT NOT NULL,
  dev BIGINT NOT NULL,
  ino BIGINT NOT NULL,
  birth_ns BIGINT NOT NULL,
  moving_from TEXT NOT NULL
);
CREATE INDEX volume_newest ON volume (created_ns DESC, id DESC);
CREATE INDEX volume_moving ON volume (moving_from) WHERE moving_from <> '';
CREATE TABLE tombstone (
  id TEXT NOT NULL PRIMARY KEY,
  name TEXT NOT NULL,
  dev BIGINT NOT NULL,
  ino BIGINT NOT NULL,
  birth_ns BIGINT NOT NULL,
  removed_ns BIGINT NOT NULL
);
CREATE TABLE sandbox (
  id TEXT NOT NULL PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  status TEXT NOT NULL,
  image TEXT NOT NULL,
  config TEXT NOT NULL,
  labels TEXT NOT NULL,
  created_ns BIGINT NOT NULL,
  updated_ns BIGINT NOT NULL,
  last_error TEXT NOT NULL
);
CREATE INDEX sandbox_newest ON sandbox (created_ns DESC, id DESC);
CREATE TABLE reserve (filler TEXT NOT NULL);
