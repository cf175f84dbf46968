package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/netsim"
	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/store"
)

// distance is the round trip between the two regions of save-remote.
const distance = 80 * time.Millisecond

// saveRemote measures the creation of a resource that refers to one of another region, 80 ms away. The rival does by hand what is least: it locks the row in the
// other region's database over the same distance, one round trip, and inserts its own.
func saveRemote(ctx context.Context, opt options) (res result, err error) {
	server, err := pgserver.Start(ctx, pgserver.Config{Version: opt.postgres, Durable: true, TCP: true, Settings: settings})
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	for _, db := range []string{sourceRegion, destRegion} {
		if err := server.CreateDatabase(ctx, db); err != nil {
			return res, err
		}
	}
	at, err := listen()
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, at.close()) }()
	far, err := netsim.Listen(ctx, "127.0.0.1:0", at.listeners[destRegion].Addr().String())
	if err != nil {
		return res, err
	}
	defer far.Close()
	farDB, err := netsim.Listen(ctx, "127.0.0.1:0", server.Addr())
	if err != nil {
		return res, err
	}
	defer farDB.Close()
	at.endpoints[destRegion] = "https://" + far.Addr()

	g, gctx := errgroup.WithContext(ctx)
	gctx, cancel := context.WithCancel(gctx)
	defer func() {
		cancel()
		err = errors.Join(err, g.Wait())
	}()
	open, closeAll, err := remoteWorld(gctx, server, at, g)
	if err != nil {
		return res, err
	}
	defer closeAll()
	const targets = 100
	targetName := func(i int) string { return fmt.Sprintf("regions/%s/targets/t%d", destRegion, i%targets) }
	for i := range targets {
		if _, err := store.Apply(ctx, open[destRegion].Store(), store.Write{Op: store.Create, Name: targetName(i), Type: "Target", Body: []byte("{}")}); err != nil {
			return res, err
		}
	}
	near, err := pgxpool.New(ctx, server.DSN(sourceRegion))
	if err != nil {
		return res, err
	}
	defer near.Close()
	dsn, err := server.TCPDSN(farDB.Addr(), destRegion)
	if err != nil {
		return res, err
	}
	remote, err := pgxpool.New(ctx, dsn)
	if err != nil {
		return res, err
	}
	defer remote.Close()
	if _, err := near.Exec(ctx, `CREATE TABLE notes (name text COLLATE "C" PRIMARY KEY, target text NOT NULL, body jsonb NOT NULL)`); err != nil {
		return res, err
	}

	payload := body(newRand(), 1)
	serial := 0
	ways := []saver{
		{"ours", func(ctx context.Context, n int64, b []byte) error {
			b = append(fmt.Appendf(nil, `{"target":%q,`, targetName(int(n))), b[1:]...)
			_, err := store.Apply(ctx, open[sourceRegion].Store(), store.Write{Op: store.Create, Name: fmt.Sprintf("regions/%s/notes/n%d", sourceRegion, n), Type: "Note", Body: b})
			return err
		}},
		{"by hand", func(ctx context.Context, n int64, b []byte) error {
			if _, err := remote.Exec(ctx, "SELECT FROM v1.resources WHERE name = $1 AND state = 0 FOR KEY SHARE", targetName(int(n))); err != nil {
				return err
			}
			_, err := near.Exec(ctx, "INSERT INTO notes VALUES ($1, $2, $3)", fmt.Sprintf("n%d", n), targetName(int(n)), b)
			return err
		}},
	}
	for _, way := range ways { // connections are made, statements prepared
		for range 3 {
			serial++
			if err := way.save(ctx, int64(serial), payload); err != nil {
				return res, fmt.Errorf("%s: %w", way.name, err)
			}
		}
	}
	far.SetLatency(distance/2, 0)
	farDB.SetLatency(distance/2, 0)
	medians := map[string][]float64{}
	for run := range opt.runs {
		for i := range ways {
			way := ways[(i+run)%len(ways)]
			var took []time.Duration
			for range cmp.Or(opt.changes, 50) {
				serial++
				began := time.Now()
				if err := way.save(ctx, int64(serial), payload); err != nil {
					return res, fmt.Errorf("%s: %w", way.name, err)
				}
				took = append(took, time.Since(began))
			}
			slices.Sort(took)
			medians[way.name] = append(medians[way.name], milliseconds(quantile(took, 0.5)))
			fmt.Fprintf(opt.out, "run %d  %-8s p50 %6.2f ms  p99 %6.2f ms  %s\n", run+1, way.name, milliseconds(quantile(took, 0.5)), milliseconds(quantile(took, 0.99)), load())
		}
	}
	return smaller(median(medians["ours"]), median(medians["by hand"]), "ms for a save that refers to a region 80 ms away, p50"), nil
}

// remoteWorld runs two Deployments of a service whose notes refer to targets of the other region.
func remoteWorld(ctx context.Context, server *pgserver.Server, at *sites, g *errgroup.Group) (open map[string]*deployment.Deployment, closeAll func(), err error) {
	ca, err := pki.NewCA("bench")
	if err != nil {
		return nil, nil, err
	}
	deployments, s := topology(at.endpoints)
	s.Spec.Versions = []v1alpha1.ServiceVersion{{Name: "v1", Resources: []v1alpha1.ResourceType{
		{Type: "Target", Plural: "targets", Patterns: []string{"regions/{region}/targets/{target}"}},
		{Type: "Note", Plural: "notes", Patterns: []string{"regions/{region}/notes/{note}"},
			References: []v1alpha1.ReferenceField{{Field: "target", Target: "Target", OnTargetDeleted: v1alpha1.DeleteBlock}}},
	}}}
	reg := registry.New()
	if problems := reg.Apply(registry.Snapshot{Deployments: deployments, Services: []*v1alpha1.ServiceDescriptor{s}}); len(problems) > 0 {
		return nil, nil, fmt.Errorf("declare the topology: %v", problems)
	}
	open = map[string]*deployment.Deployment{}
	closeAll = func() {
		for _, d := range open {
			d.Close()
		}
	}
	for _, region := range []string{sourceRegion, destRegion} {
		cert, err := ca.Issue(pki.Identity{TrustDomain: trustDomain, Service: service, Region: region}, time.Now().Add(24*time.Hour))
		if err != nil {
			return nil, closeAll, err
		}
		tls, err := pki.Static(cert, ca.CertPEM())
		if err != nil {
			return nil, closeAll, err
		}
		d, err := deployment.Open(ctx, deployment.Config{Key: registry.Key{Service: service, Region: region}, Registry: reg, DSN: server.DSN(region), TLS: tls, AuditInterval: -1, Logger: quiet})
		if err != nil {
			return nil, closeAll, err
		}
		open[region] = d
		api, err := d.Server(at.listeners[region])
		if err != nil {
			return nil, closeAll, err
		}
		g.Go(func() error {
			if err := d.Run(ctx, api, d.Manage); ctx.Err() == nil {
				return fmt.Errorf("the Deployment in %s has ended: %w", region, err)
			}
			return nil
		})
	}
	return open, closeAll, nil
}
