-- State of one Deployment's database. Run once, as the database's owner; search_path is ctl.

-- Which Deployment this database belongs to, and the only API version that takes writes. Every write checks it
-- under the shared form of the write fence; a version switch changes it under the exclusive form.
CREATE TABLE deployment_state (
    one              boolean PRIMARY KEY DEFAULT true CHECK (one),
    service          text NOT NULL,
    region           text NOT NULL,
    ring             int  NOT NULL CHECK (ring > 0),
    writable_version text NOT NULL
);

-- The history in which xids, and so cursors, mean something: one (cluster, timeline) and its number.
CREATE TABLE feed_epoch (
    one               boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch             bigint NOT NULL,
    system_identifier bigint NOT NULL,
    timeline          int    NOT NULL,
    raised_at         timestamptz NOT NULL DEFAULT now()
);

-- Durable cursors: up to where the copies of a peer's shards are complete.
CREATE TABLE sync_cursor (
    service  text NOT NULL,
    region   text NOT NULL,
    version  text NOT NULL,
    shards   int4range NOT NULL,
    epoch    bigint NOT NULL,
    position text NOT NULL,           -- a pg_snapshot of the peer; text, because its xids are not ours
    saved_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (service, region, version, shards)
);

-- Rows of a peer that could not be applied. A later version of the row that can be applied removes the entry.
CREATE TABLE quarantine (
    version          text NOT NULL,
    name             text COLLATE "C" NOT NULL,
    source_region    text NOT NULL,
    epoch            bigint NOT NULL,
    resource_version bigint NOT NULL,
    cause            text NOT NULL,
    tries            int NOT NULL DEFAULT 1,
    first_seen       timestamptz NOT NULL DEFAULT now(),
    last_seen        timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (version, source_region, name)
);

-- conflict aborts the statement that discovers that a row changed under it; the writer repeats.
CREATE FUNCTION conflict(name text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'concurrent write of %', name USING ERRCODE = 'serialization_failure';
END $$;

CREATE FUNCTION current_timeline() RETURNS int LANGUAGE sql AS $$
    -- Not pg_control_checkpoint(): that one shows the old timeline until the first checkpoint after a promotion.
    SELECT ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int
$$;

-- raise_epoch starts a new epoch. Its number follows the wall clock, at least by one: a database that is restored from an old backup does not know
-- how many epochs have passed since, and its peers refuse numbers that they have seen before. It then re-stamps rows whose change lies in the future, which after a dump and reload
-- is all of them: no cursor would ever deliver them otherwise.
CREATE FUNCTION raise_epoch() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v text;
    e bigint;
BEGIN
    UPDATE ctl.feed_epoch SET epoch = greatest(epoch + 1, extract(epoch FROM clock_timestamp())::bigint), raised_at = now(), timeline = ctl.current_timeline(),
           system_identifier = (SELECT system_identifier FROM pg_control_system())
    RETURNING epoch INTO e;
    FOR v IN SELECT DISTINCT scope FROM ctl.migrations WHERE scope <> 'ctl' LOOP
        EXECUTE format('UPDATE %I.resources SET change = pg_current_xact_id() WHERE change >= pg_snapshot_xmax(pg_current_snapshot()) AND change <> pg_current_xact_id()', v);
        EXECUTE format('UPDATE %I.horizon SET purged = NULL WHERE purged >= pg_snapshot_xmax(pg_current_snapshot())', v);
    END LOOP;
    RETURN e;
END $$;

-- prove_epoch returns the epoch after making sure that it belongs to this cluster and timeline. Every new connection calls it
-- before its first use: a failover or a restore ends all connections, so no write and no read can use a stale epoch.
CREATE FUNCTION prove_epoch() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    here ctl.feed_epoch;
    sys  bigint := (SELECT system_identifier FROM pg_control_system());
    tl   int;
BEGIN
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION 'this server is a standby' USING ERRCODE = 'read_only_sql_transaction';
    END IF;
    tl := ctl.current_timeline();
    SELECT * INTO STRICT here FROM ctl.feed_epoch;
    IF here.system_identifier = sys AND here.timeline = tl THEN
        RETURN here.epoch;
    END IF;
    -- Serialises those who see the change at once; the second one finds the work done.
    SELECT * INTO STRICT here FROM ctl.feed_epoch FOR UPDATE;
    IF here.system_identifier = sys AND here.timeline = tl THEN
        RETURN here.epoch;
    END IF;
    RETURN ctl.raise_epoch();
END $$;

-- The highest feed epoch seen of each peer. What was read in an older epoch must not be merged any more: the peer may have lost it.
CREATE TABLE peer_epoch (
    service text NOT NULL,
    region  text NOT NULL,
    epoch   bigint NOT NULL,
    PRIMARY KEY (service, region)
);

-- save_cursor replaces what is known about a range of shards. In the steady state it is one update in place; when the ranges of nodes have
-- changed, ranges that overlap keep the part that this one does not cover.
CREATE FUNCTION save_cursor(p_service text, p_region text, p_version text, p_shards int4range, p_epoch bigint, p_position text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE ctl.sync_cursor SET epoch = p_epoch, position = p_position, saved_at = now()
     WHERE service = p_service AND region = p_region AND version = p_version AND shards = p_shards;
    IF FOUND THEN
        RETURN;
    END IF;
    WITH old AS (
        DELETE FROM ctl.sync_cursor WHERE service = p_service AND region = p_region AND version = p_version AND shards && p_shards
        RETURNING *
    )
    INSERT INTO ctl.sync_cursor (service, region, version, shards, epoch, position, saved_at)
    SELECT service, region, version, rest, epoch, position, saved_at
      FROM old, unnest(int4multirange(shards) - int4multirange(p_shards)) AS rest
    UNION ALL
    SELECT p_service, p_region, p_version, p_shards, p_epoch, p_position, now()
    ON CONFLICT (service, region, version, shards) DO UPDATE SET epoch = excluded.epoch, position = excluded.position, saved_at = now();
END $$;
