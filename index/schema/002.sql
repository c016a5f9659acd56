-- The identity code of a model, where one could be made, and the encoder that made it: codes of
-- different encoders cannot be compared.
CREATE TABLE codes (
    model   INTEGER PRIMARY KEY REFERENCES models (id) ON DELETE CASCADE,
    encoder TEXT NOT NULL,
    code    BLOB NOT NULL
) STRICT;
CREATE INDEX codes_by_encoder ON codes (encoder);
