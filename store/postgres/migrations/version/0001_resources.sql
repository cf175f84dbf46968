-- One API version's resources. search_path is that version's schema.

CREATE TABLE resources (
    name             text COLLATE "C" PRIMARY KEY,
    type             text COLLATE "C" NOT NULL,
    uuid             uuid NOT NULL,
    epoch            bigint NOT NULL,
    resource_version bigint NOT NULL,
    generation       bigint NOT NULL,
    shard            int NOT NULL,
    change           xid8 NOT NULL DEFAULT pg_current_xact_id(),
    owning_region    text COLLATE "C" NOT NULL,
    regions          text[] NOT NULL,
    left_regions     text[] NOT NULL DEFAULT '{}',
    state            smallint NOT NULL DEFAULT 0,
    block_deletion   boolean NOT NULL DEFAULT false,
    create_time      timestamptz NOT NULL,
    update_time      timestamptz NOT NULL,
    delete_time      timestamptz,
    meta             jsonb NOT NULL DEFAULT '{}',
    body             jsonb,
    CHECK ((state = 2) = (body IS NULL))
);

-- The change feed: rows in the order of the transactions that last wrote them.
CREATE INDEX resources_change ON resources (change, shard);
-- Few distinct values, so deduplication keeps it tiny: it finds the rare types; a list of a frequent type walks the primary key.
CREATE INDEX resources_type ON resources (type);
-- Tombstones, for the purge.
CREATE INDEX resources_gone ON resources (delete_time) WHERE state = 2;

-- What has been purged: the largest change (a cursor that had not seen it is lost) and the largest version (a name that is
-- born again starts above it).
CREATE TABLE horizon (
    one    boolean PRIMARY KEY DEFAULT true CHECK (one),
    purged xid8,
    floor  bigint NOT NULL DEFAULT 0
);
INSERT INTO horizon DEFAULT VALUES;

-- left_after returns the regions that must drop their copy once regions is was becomes regions now.
CREATE FUNCTION left_after(was text[], already text[], now text[], self text) RETURNS text[] LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN now @> '{*}' THEN '{}' ELSE
        ARRAY(SELECT r FROM (SELECT unnest(was || already) EXCEPT SELECT unnest(now)) AS x(r) WHERE r <> self ORDER BY r)
    END
$$;
