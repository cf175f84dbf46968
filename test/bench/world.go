package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/internal/pgserver"
	"github.com/dbcontroller/db-controller/internal/pki"
	"github.com/dbcontroller/db-controller/store/postgres"
)

const (
	service      = "items.example.com"
	trustDomain  = "example.com"
	sourceRegion = "eu"
	destRegion   = "us"
)

// clusters are the source's and the destination's, started by the first bench that needs them.
type clusters struct {
	source, dest *pgserver.Server
	worlds       int // how many have used them
}

// settings leave the measurement to replication: no checkpoint or vacuum starts in its middle (both are made between runs), the
// working set fits into memory, as it does on a server that is sized for its load, and a subscription that is enabled starts at once
// (by default its worker starts up to five seconds later).
var settings = map[string]string{
	"shared_buffers": "1GB", "max_wal_size": "8GB", "min_wal_size": "1GB", "checkpoint_timeout": "1h", "autovacuum": "off", "work_mem": "64MB",
	"maintenance_work_mem": "256MB", "wal_retrieve_retry_interval": "10ms",
}

func (c *clusters) start(ctx context.Context, version string) (err error) {
	for _, s := range []**pgserver.Server{&c.source, &c.dest} {
		if *s == nil {
			if *s, err = pgserver.Start(ctx, pgserver.Config{Version: version, Settings: settings}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *clusters) stop() error {
	var errs []error
	for _, s := range []*pgserver.Server{c.source, c.dest} {
		if s != nil {
			errs = append(errs, s.Stop())
		}
	}
	return errors.Join(errs...)
}

// world is one service in two regions: a database in the source cluster, and in the destination's one for each contender.
type world struct {
	opt          options
	source, dest *pgserver.Server
	ca           *pki.CA
	sourceConn   *pgx.Conn

	sourceDB string
	oursDB   string // what the product copies to
	nativeDB string // what the subscription copies to
	slot     string // of the rival; also its publication and subscription
}

// newWorld makes the three databases, all with the product's schema. Close it.
func newWorld(ctx context.Context, opt options) (_ *world, err error) {
	if err := opt.clusters.start(ctx, opt.postgres); err != nil {
		return nil, err
	}
	opt.clusters.worlds++
	n := strconv.Itoa(opt.clusters.worlds)
	w := &world{
		opt: opt, source: opt.clusters.source, dest: opt.clusters.dest,
		sourceDB: "source" + n, oursDB: "ours" + n, nativeDB: "native" + n, slot: "bench" + n,
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.ca, err = pki.NewCA("bench"); err != nil {
		return nil, err
	}
	for _, d := range w.databases() {
		if err = prepare(ctx, d.server, d.name, d.region); err != nil {
			return nil, err
		}
	}
	if w.sourceConn, err = w.source.Connect(ctx, w.sourceDB); err != nil {
		return nil, err
	}
	if _, err = w.sourceConn.Exec(ctx, backlogSQL); err != nil {
		return nil, fmt.Errorf("prepare the source: %w", err)
	}
	return w, nil
}

type database struct {
	server       *pgserver.Server
	name, region string
}

func (w *world) databases() []database {
	return []database{{w.source, w.sourceDB, sourceRegion}, {w.dest, w.oursDB, destRegion}, {w.dest, w.nativeDB, destRegion}}
}

// prepare makes a database with the schema of the product, migrated by the product.
func prepare(ctx context.Context, s *pgserver.Server, name, region string) error {
	if err := s.CreateDatabase(ctx, name); err != nil {
		return err
	}
	st, err := postgres.Open(ctx, postgres.Config{DSN: s.DSN(name), Service: service, Region: region, Version: "v1", Ring: ring, Logger: quiet})
	if err != nil {
		return err
	}
	st.Close()
	return nil
}

// quiet shows only what is worth stopping for.
var quiet = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))

// close drops the databases.
func (w *world) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var errs []error
	if w.sourceConn != nil {
		errs = append(errs, w.sourceConn.Close(ctx))
	}
	for _, d := range w.databases() {
		errs = append(errs, d.server.DropDatabase(ctx, d.name))
	}
	return errors.Join(errs...)
}

// tidy does what autovacuum and the checkpointer would do at a moment of their own choice.
func (w *world) tidy(ctx context.Context) error {
	for _, d := range w.databases() {
		c, err := d.server.Connect(ctx, d.name)
		if err != nil {
			return err
		}
		_, err = c.Exec(ctx, "VACUUM ANALYZE v1.resources")
		if err == nil {
			_, err = c.Exec(ctx, "CHECKPOINT")
		}
		if err := errors.Join(err, c.Close(context.WithoutCancel(ctx))); err != nil {
			return fmt.Errorf("tidy database %s: %w", d.name, err)
		}
	}
	return nil
}

// topology is one service whose resources belong to the source and are copied to the destination.
func topology(endpoints map[string]string) ([]*v1alpha1.Deployment, *v1alpha1.ServiceDescriptor) {
	var deployments []*v1alpha1.Deployment
	for _, region := range []string{sourceRegion, destRegion} {
		d := &v1alpha1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: region}}
		d.Spec = v1alpha1.DeploymentSpec{Service: service, Region: region, Version: "v1", Endpoint: endpoints[region], Shards: ring,
			TLS: &v1alpha1.TLSSpec{SecretRef: v1alpha1.SecretRef{Name: region + "-tls"}, TrustDomain: trustDomain}}
		deployments = append(deployments, d)
	}
	s := &v1alpha1.ServiceDescriptor{ObjectMeta: metav1.ObjectMeta{Name: "items"}}
	s.Spec = v1alpha1.ServiceDescriptorSpec{
		Service:           service,
		MultiRegionPolicy: &v1alpha1.MultiRegionPolicy{EnabledRegions: []string{sourceRegion, destRegion}, DefaultControlRegion: sourceRegion},
		Versions: []v1alpha1.ServiceVersion{{Name: "v1", Resources: []v1alpha1.ResourceType{
			{Type: "Item", Plural: "items", Patterns: []string{"items/{item}"}},
		}}},
	}
	return deployments, s
}

// sites are the addresses at which the two Deployments serve, over loopback.
type sites struct {
	listeners map[string]*net.TCPListener
	endpoints map[string]string
}

func listen() (*sites, error) {
	s := &sites{map[string]*net.TCPListener{}, map[string]string{}}
	for _, region := range []string{sourceRegion, destRegion} {
		l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("listen: %w", err), s.close())
		}
		s.listeners[region] = l
		s.endpoints[region] = "https://" + l.Addr().String()
	}
	return s, nil
}

func (s *sites) close() error {
	var errs []error
	for _, l := range s.listeners {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// certificate of a Deployment, good for longer than any bench.
func (w *world) certificate(region string) (pki.KeyPair, error) {
	return w.ca.Issue(pki.Identity{TrustDomain: trustDomain, Service: service, Region: region}, time.Now().Add(24*time.Hour))
}
