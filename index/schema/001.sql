-- One row a model. The vector stands beside the fingerprint so that a search reads 4 KB a model.
CREATE TABLE models (
    id          INTEGER PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    location    TEXT NOT NULL,
    format      TEXT NOT NULL,
    sha256      TEXT NOT NULL,
    content     BLOB NOT NULL,
    identity    BLOB NOT NULL,
    parameters  INTEGER NOT NULL,
    size_bytes  INTEGER NOT NULL,
    adapter     INTEGER NOT NULL,
    method      INTEGER NOT NULL,
    added_at    TEXT NOT NULL,
    stamp       TEXT NOT NULL,
    declared    TEXT NOT NULL,
    vector      BLOB NOT NULL,
    fingerprint BLOB NOT NULL
) STRICT;
CREATE INDEX models_by_sha256 ON models (sha256);
CREATE INDEX models_by_content ON models (content);
CREATE INDEX models_by_location ON models (location);

-- Which models hold a tensor of this size and norm: equal tensors meet here, whatever their
-- names, types of file and order of axes.
CREATE TABLE keys (
    key   BLOB NOT NULL,
    model INTEGER NOT NULL REFERENCES models (id) ON DELETE CASCADE,
    size  INTEGER NOT NULL,
    PRIMARY KEY (key, model)
) STRICT, WITHOUT ROWID;
CREATE INDEX keys_by_model ON keys (model);

-- What was measured between two identities. It depends on nothing else, so it never grows stale.
CREATE TABLE measurements (
    first  BLOB NOT NULL,
    second BLOB NOT NULL,
    method INTEGER NOT NULL,
    body   TEXT NOT NULL,
    PRIMARY KEY (first, second, method)
) STRICT, WITHOUT ROWID;

-- Goes up with every change, so that a cache knows whether it is stale.
CREATE TABLE generation (value INTEGER NOT NULL) STRICT;
INSERT INTO generation VALUES (0);
