-- Claims on shards: who may write for them. A process that was paused, cut off or slow may believe that it still works on shards which another one has taken over; its next write is
-- refused here, in the transaction of the write.

-- The claims in force. An epoch that is not in here has been revoked, or given back. Of one kind of nodes no two overlap, and a later claim has a higher epoch.
CREATE TABLE shard_epoch (
    epoch     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind      text NOT NULL,
    shards    int4range NOT NULL CHECK (NOT isempty(shards)),
    plan      bigint NOT NULL,        -- the version of the plan that grants it
    holder    text NOT NULL,
    raised_at timestamptz NOT NULL DEFAULT now()
);

-- The highest plan that a claim was ever made under; its row is also the lock under which claims of a kind are made, one after the other.
CREATE TABLE shard_plan (
    kind    text PRIMARY KEY,
    highest bigint NOT NULL
);

-- A session under a claim says so in the setting dbcontroller.claim. What it writes holds this lock, shared, until it is committed; a claim is revoked under the exclusive form. It
-- looks for the claim after it has the lock: a volatile function sees what was committed up to then, not only what the statement that called it sees.
CREATE FUNCTION check_claim() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    claim bigint := current_setting('dbcontroller.claim')::bigint;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(3518, (claim & 2147483647)::int);
    PERFORM FROM ctl.shard_epoch WHERE epoch = claim;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'claim % on shards has been revoked', claim USING ERRCODE = 'DB004';
    END IF;
    RETURN NULL;
END $$;

-- fence makes a table refuse what is written under a claim that has been revoked. Sessions without a claim pay for the look at a setting.
CREATE FUNCTION fence(of regclass) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE TRIGGER claim BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON %s FOR EACH STATEMENT
        WHEN (current_setting(''dbcontroller.claim'', true) <> '''') EXECUTE FUNCTION ctl.check_claim()', of);
END $$;

SELECT fence(t::regclass) FROM unnest(ARRAY['sync_cursor', 'quarantine', 'peer_epoch', 'referrer_epoch', 'swept_epoch', 'verified', 'verification', 'policy_progress', 'measured_rate']) AS t;

-- revoke_claim ends a claim: no transaction under it is in flight when it returns, and none can commit later. Whoever holds it up for longer than the timeout, such as a process
-- that is paused in the middle of a COPY, loses its session, and with it its transaction.
CREATE FUNCTION revoke_claim(claim bigint) RETURNS boolean LANGUAGE plpgsql SET lock_timeout = '2s' AS $$
DECLARE
    key int := (claim & 2147483647)::int;
BEGIN
    LOOP
        BEGIN
            PERFORM pg_advisory_xact_lock(3518, key);
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_terminate_backend(pid) FROM pg_locks
             WHERE locktype = 'advisory' AND classid = 3518 AND objid = key::oid AND objsubid = 2 AND granted AND pid <> pg_backend_pid()
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database());
        END;
    END LOOP;
    DELETE FROM ctl.shard_epoch WHERE epoch = claim;
    RETURN FOUND;
END $$;

-- raise_claim makes p_holder the only one that may write for shards, under the epoch that it returns.
CREATE FUNCTION raise_claim(p_kind text, p_shards int4range, p_plan bigint, p_holder text) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    newer ctl.shard_epoch;
    old   bigint;
    new   bigint;
BEGIN
    LOCK TABLE ctl.shard_epoch IN ROW EXCLUSIVE MODE; -- waits for raise_epoch, before there is anything for which that could wait
    INSERT INTO ctl.shard_plan AS p (kind, highest) VALUES (p_kind, p_plan) ON CONFLICT (kind) DO UPDATE SET highest = greatest(p.highest, excluded.highest);
    SELECT * INTO newer FROM ctl.shard_epoch WHERE kind = p_kind AND shards && p_shards AND plan > p_plan LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'shards % of % are claimed by % under plan %, not %', newer.shards, p_kind, newer.holder, newer.plan, p_plan USING ERRCODE = 'DB005';
    END IF;
    FOR old IN SELECT epoch FROM ctl.shard_epoch WHERE kind = p_kind AND shards && p_shards ORDER BY epoch LOOP
        PERFORM ctl.revoke_claim(old);
    END LOOP;
    INSERT INTO ctl.shard_epoch (kind, shards, plan, holder) VALUES (p_kind, p_shards, p_plan, p_holder) RETURNING epoch INTO new;
    RETURN new;
END $$;

-- A database that has been restored may bring claims back that were revoked since, and does not know which epochs were given out: none of them is valid in the new history, and its
-- own begin above those of any other, at the clock's milliseconds.
ALTER FUNCTION raise_epoch() RENAME TO begin_epoch;
CREATE FUNCTION raise_epoch() RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
    LOCK TABLE ctl.shard_epoch IN SHARE ROW EXCLUSIVE MODE;
    PERFORM ctl.revoke_claim(epoch) FROM ctl.shard_epoch ORDER BY epoch;
    PERFORM setval(seq, greatest(nextval(seq), (extract(epoch FROM clock_timestamp()) * 1000)::bigint)) FROM CAST(pg_get_serial_sequence('ctl.shard_epoch', 'epoch') AS regclass) AS seq;
    RETURN ctl.begin_epoch();
END $$;
