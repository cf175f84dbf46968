-- The search store of one API version. search_path is its schema. Whatever is here can be filled again from the Deployment's database.

CREATE TABLE owner (
    one     boolean PRIMARY KEY DEFAULT true CHECK (one),
    service text NOT NULL,
    region  text NOT NULL,
    format  int  NOT NULL
);

-- Who writes which shards, and up to where they are complete.
CREATE TABLE leases (
    first_shard int NOT NULL,
    end_shard   int NOT NULL,
    holder      text NOT NULL DEFAULT '',
    seq         bigint NOT NULL DEFAULT 0,
    schema      text NOT NULL,
    cursor      text NOT NULL,
    saved_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (first_shard, end_shard)
);

-- a to d are the texts by weight, those of several fields with a unit separator between them. body has the values that filters ask for.
CREATE TABLE documents (
    name             text COLLATE "C" PRIMARY KEY,
    type             text COLLATE "C" NOT NULL,
    uuid             uuid NOT NULL,
    epoch            bigint NOT NULL,
    resource_version bigint NOT NULL,
    shard            int NOT NULL,
    fingerprint      text NOT NULL,
    a                text NOT NULL,
    b                text NOT NULL,
    c                text NOT NULL,
    d                text NOT NULL,
    body             jsonb NOT NULL,
    sum              uuid NOT NULL, -- of all the above, as it was written: tells what was changed by hand
    tsv              tsvector NOT NULL GENERATED ALWAYS AS (
        setweight(to_tsvector('english', a), 'A') || setweight(to_tsvector('english', b), 'B') ||
        setweight(to_tsvector('english', c), 'C') || setweight(to_tsvector('english', d), 'D')) STORED
);
CREATE INDEX documents_tsv ON documents USING gin (tsv);
CREATE INDEX documents_shard ON documents (shard);
CREATE INDEX documents_type ON documents (type);
CREATE INDEX documents_body ON documents USING gin (body jsonb_path_ops); -- filters by exact values

-- Without its documents no cursor is good.
CREATE FUNCTION forget() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM leases;
    RETURN NULL;
END $$;
CREATE TRIGGER emptied AFTER TRUNCATE ON documents EXECUTE FUNCTION forget();

-- step takes a lease one batch further. An empty up_to leaves the cursor as it is.
CREATE FUNCTION step(from_shard int, to_shard int, by_holder text, at_seq bigint, up_to text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE leases SET seq = seq + 1, cursor = CASE WHEN up_to = '' THEN cursor ELSE up_to END, saved_at = now()
    WHERE first_shard = from_shard AND end_shard = to_shard AND holder = by_holder AND seq = at_seq;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'lease lost' USING ERRCODE = 'DB001';
    END IF;
END $$;
