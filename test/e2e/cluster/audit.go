package cluster

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"
)

// The triggers note, in the order in which rows are written, under which claim a row was written, and which claims there have ever been. They fire after the
// fence has let the write pass, and are rolled back with it.
const auditSQL = `
CREATE TABLE public.e2e_writes (seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, shard int NOT NULL, claim bigint NOT NULL);
CREATE TABLE public.e2e_claims (epoch bigint PRIMARY KEY, kind text NOT NULL, shards int4range NOT NULL, holder text NOT NULL, plan bigint NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE FUNCTION public.e2e_write() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF coalesce(current_setting('dbcontroller.claim', true), '') <> '' THEN
        INSERT INTO public.e2e_writes (shard, claim) VALUES (coalesce(NEW.shard, OLD.shard), current_setting('dbcontroller.claim')::bigint);
    END IF;
    RETURN NULL;
END $$;
CREATE FUNCTION public.e2e_claim() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.e2e_claims (epoch, kind, shards, holder, plan) VALUES (NEW.epoch, NEW.kind, NEW.shards, NEW.holder, NEW.plan);
    RETURN NULL;
END $$;
CREATE TRIGGER e2e_write AFTER INSERT OR UPDATE OR DELETE ON v1.resources FOR EACH ROW EXECUTE FUNCTION public.e2e_write();
CREATE TRIGGER e2e_claim AFTER INSERT ON ctl.shard_epoch FOR EACH ROW EXECUTE FUNCTION public.e2e_claim();
INSERT INTO public.e2e_claims (epoch, kind, shards, holder, plan) SELECT epoch, kind, shards, holder, plan FROM ctl.shard_epoch ON CONFLICT DO NOTHING;
`

// Audit begins to note the writes of nodes in the region's database. Its tables must be there.
func (r *Region) Audit(ctx context.Context) error {
	_, err := r.DB.Exec(ctx, auditSQL)
	return err
}

// Audited is what the triggers of a region have noted.
type Audited struct {
	Writes, Claims int64
	// Regressed are writes of a shard under an older claim than an earlier write of the same kind: stale owners that were let through.
	Regressed int64
	// Outside are copies of a shard that their claim is not for. (Nodes for policies and references work for the shards of holders and targets, and write what is below those.)
	Outside int64
	// Unknown are writes under a claim that was never made.
	Unknown int64
}

// Audited counts what the triggers have noted.
func (r *Region) Audited(ctx context.Context) (a Audited, err error) {
	err = r.DB.QueryRow(ctx, `
		WITH w AS (SELECT w.seq, w.shard, w.claim, c.kind, c.shards FROM public.e2e_writes w LEFT JOIN public.e2e_claims c ON c.epoch = w.claim),
		ordered AS (SELECT *, max(claim) OVER (PARTITION BY kind, shard ORDER BY seq ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before FROM w)
		SELECT count(*), (SELECT count(*) FROM public.e2e_claims), count(*) FILTER (WHERE claim < before),
		       count(*) FILTER (WHERE kind = 'syncing' AND NOT shards @> shard), count(*) FILTER (WHERE kind IS NULL) FROM ordered`).
		Scan(&a.Writes, &a.Claims, &a.Regressed, &a.Outside, &a.Unknown)
	return a, err
}

// Owners returns who may write for each shard as a node of a kind, as the database's fence says; "" for nobody.
func (r *Region) Owners(ctx context.Context, kind string) ([]string, error) {
	owners := make([]string, 4096)
	rows, err := r.DB.Query(ctx, `SELECT lower(shards), upper(shards), holder FROM ctl.shard_epoch WHERE kind = $1 AND NOT isempty(shards)`, kind)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var from, to int
		var holder string
		if err := rows.Scan(&from, &to, &holder); err != nil {
			return nil, err
		}
		for s := from; s < to; s++ {
			owners[s] = holder
		}
	}
	return owners, rows.Err()
}

// Covered says whether every shard is owned, by somebody who is alive, and every live manager that may own some does: the sizes are within 20 % of even.
func Covered(owners []string, alive func(holder string) bool) bool {
	for _, o := range owners {
		if o == "" || !alive(o) {
			return false
		}
	}
	return true
}

// Moved is the share of the ring whose owner is not the one from before.
func Moved(before, after []string) float64 {
	n := 0
	for i := range before {
		if before[i] != after[i] {
			n++
		}
	}
	return float64(n) / float64(len(before))
}

// Sizes counts the shards of each owner.
func Sizes(owners []string) map[string]int {
	sizes := map[string]int{}
	for _, o := range owners {
		sizes[o]++
	}
	return sizes
}

// Pick returns one of the processes at random.
func Pick(random *rand.Rand, from []*Process) *Process { return from[random.IntN(len(from))] }

// Until polls until done reports true, and returns how long that took.
func Until(ctx context.Context, limit time.Duration, what string, done func() (bool, string)) (time.Duration, error) {
	began := time.Now()
	for {
		ok, why := done()
		switch {
		case ok:
			return time.Since(began), nil
		case time.Since(began) > limit:
			return 0, fmt.Errorf("%s: not within %s: %s", what, limit, why)
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}
