-- The units of a model that are matched one by one with those of another, as
-- embedder.matching packs them. They stand apart from the codes, of which a search reads all.
CREATE TABLE units (
    model INTEGER PRIMARY KEY REFERENCES codes (model) ON DELETE CASCADE,
    body  BLOB NOT NULL
) STRICT;

-- Codes without units are as good as those of another encoder: they are made anew. The code of a
-- model whose architecture is not known (plain) has none.
UPDATE codes SET encoder = encoder || ' without units' WHERE encoder NOT LIKE 'plain-%';
