package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	ctrlmetrics "sigs.k8s.io/controller-runtime/pkg/metrics"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/dbcontroller/db-controller/api/v1alpha1"
	"github.com/dbcontroller/db-controller/cmd/db-controller/internal/fleet"
	"github.com/dbcontroller/db-controller/controllers"
	"github.com/dbcontroller/db-controller/deployment"
	"github.com/dbcontroller/db-controller/internal/dialguard"
	"github.com/dbcontroller/db-controller/registry"
	"github.com/dbcontroller/db-controller/registry/folder"
)

// topology says where the Deployments are declared, and which of them are ours.
type topology struct {
	manifests string
	region    string

	kubeconfig string
	namespaces []string
	peerCIDRs  []string
	loopback   bool
	elect      bool
	electionID string
	electionNS string
}

func (t *topology) flags(f *pflag.FlagSet) {
	f.StringVar(&t.manifests, "manifests", "", "`folder` with manifests of Deployments, ServiceDescriptors and Secrets; empty: read them from Kubernetes")
	f.StringVar(&t.region, "region", "", "the `region` of this process (required)")
	f.StringVar(&t.kubeconfig, "kubeconfig", "", "kubeconfig `file`; empty: $KUBECONFIG, the cluster that this process runs in, or ~/.kube/config")
	f.StringSliceVar(&t.namespaces, "watch-namespaces", nil, "`namespaces` whose objects count; empty: all")
	f.StringSliceVar(&t.peerCIDRs, "peer-cidrs", nil, "`networks` in which endpoints of other Deployments may be; empty: everywhere but on this machine, its links and the control plane")
	f.BoolVar(&t.loopback, "allow-loopback-peers", false, "endpoints of other Deployments may be on this machine; with --manifests they always may")
}

func (t *topology) electionFlags(f *pflag.FlagSet) {
	f.BoolVar(&t.elect, "leader-elect", false, "in Kubernetes: let one of several replicas write status; copying does not depend on it")
	f.StringVar(&t.electionID, "leader-election-id", "", "`name` of the Lease; default db-controller-REGION. Two releases in one namespace need different ones")
	f.StringVar(&t.electionNS, "leader-election-namespace", "", "`namespace` of the Lease; default the one that this process runs in")
}

// guard returns what connections to other Deployments are opened with. Who writes the manifests of a folder has the credentials in it, too, so the guard trusts
// them with this machine; who may write a Deployment in Kubernetes has none of it.
func (t *topology) guard() (*dialguard.Guard, error) {
	cfg := dialguard.Config{AllowLoopback: t.loopback || t.manifests != ""}
	if host := os.Getenv("KUBERNETES_SERVICE_HOST"); host != "" {
		cfg.Denied = []string{host}
	}
	for _, text := range t.peerCIDRs {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, usageError{fmt.Errorf("--peer-cidrs %q: is no network: write for example 10.0.0.0/8,fd00::/8", text)}
		}
		cfg.Peers = append(cfg.Peers, p.Masked())
	}
	return dialguard.New(cfg), nil
}

// source feeds a registry.
type source struct {
	secrets registry.Secrets
	run     func(context.Context) error
	metrics prometheus.Gatherer
}

// operated is what the controllers ask of the Deployments that run here: fleet.Fleet.
type operated interface {
	controllers.StatusSource
	controllers.Verifier
	controllers.Cleaner
}

// open returns the source. status, unless nil, makes it write the status of our Deployments back.
func (t *topology) open(reg *registry.Registry, log *slog.Logger, status operated) (*source, error) {
	if t.region == "" {
		return nil, usageError{errors.New("--region is required: the region whose Deployments run here, for example --region eu")}
	}
	if t.manifests != "" {
		process := fleet.NewProcessMetrics(version)
		process.MustRegister(reg)
		if info, err := os.Stat(t.manifests); err != nil || !info.IsDir() {
			return nil, usageError{fmt.Errorf("--manifests %s: is not a folder that can be read", t.manifests)}
		}
		src, err := folder.New(reg, folder.Config{Dir: t.manifests, Logger: log})
		if err != nil {
			return nil, err
		}
		return &source{secrets: src, run: src.Run, metrics: process}, nil
	}
	return t.openKubernetes(reg, log, status)
}

func (t *topology) openKubernetes(reg *registry.Registry, log *slog.Logger, status operated) (*source, error) {
	ctrl.SetLogger(logr.FromSlogHandler(log.Handler()))
	klog.SetLogger(logr.FromSlogHandler(log.Handler()))
	config, err := t.restConfig()
	if err != nil {
		return nil, fmt.Errorf("find Kubernetes: %w; without a cluster, name a folder of manifests with --manifests", err)
	}
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	electionID := t.electionID
	if electionID == "" {
		electionID = "db-controller-" + t.region
	}
	options := ctrl.Options{
		Scheme:         scheme,
		Logger:         logr.FromSlogHandler(log.Handler()),
		Metrics:        metricsserver.Options{BindAddress: "0"}, // the operator's ports serve them
		LeaderElection: t.elect, LeaderElectionID: electionID, LeaderElectionNamespace: t.electionNS,
		LeaderElectionReleaseOnCancel: true, // the process ends right after
	}
	if len(t.namespaces) > 0 {
		options.Cache.DefaultNamespaces = map[string]cache.Config{}
		for _, ns := range t.namespaces {
			options.Cache.DefaultNamespaces[ns] = cache.Config{}
		}
	}
	mgr, err := ctrl.NewManager(config, options)
	if err != nil {
		return nil, fmt.Errorf("connect to Kubernetes: %w", err)
	}
	if status != nil {
		err = controllers.Add(mgr, controllers.Options{Region: t.region, Registry: reg, Status: status, Verifier: status, Cleaner: status})
	} else {
		err = controllers.AddTopology(mgr, reg)
	}
	if err != nil {
		return nil, err
	}
	if err := errors.Join(ctrlmetrics.Registry.Register(reg), ctrlmetrics.Registry.Register(fleet.BuildInfo(version))); err != nil {
		return nil, fmt.Errorf("register metrics of the topology: %w", err)
	}
	return &source{secrets: controllers.NewSecrets(mgr.GetAPIReader()), run: mgr.Start, metrics: ctrlmetrics.Registry}, nil
}

func (t *topology) restConfig() (*rest.Config, error) {
	if t.kubeconfig != "" {
		return clientcmd.BuildConfigFromFlags("", t.kubeconfig)
	}
	return ctrl.GetConfig()
}

// tuning are the settings of each Deployment.
type tuning struct {
	deployment.Config
}

func (t *tuning) flags(f *pflag.FlagSet) {
	f.IntVar(&t.MaxConns, "max-conns", 16, "most `connections` to the database of a Deployment")
}

func (t *tuning) managerFlags(f *pflag.FlagSet) {
	f.IntVar(&t.MaxShardsPerNode, "max-shards-per-node", 0, "widest `range` of shards that one stream copies; 0: 2048, negative: no limit")
	f.DurationVar(&t.AuditInterval, "audit-interval", 0, "how often live copies are compared with their owner; 0: 10m, negative: never")
	f.DurationVar(&t.VerifyInterval, "verify-interval", 0, "how often all copies are compared with their owner by content; 0: 1h, negative: never")
	f.DurationVar(&t.PurgeAfter, "purge-after", 0, "how long copies outlive the removal of their owner's Deployment; 0: 24h, negative: for ever")
	f.DurationVar(&t.Retention, "tombstone-retention", 0, "how long deletions are remembered; a region that is away for longer compares when it comes back; 0: 24h")
}

// ops are the operator's ports and the log.
type ops struct {
	health, metrics string
	format, level   string
}

func (o *ops) flags(f *pflag.FlagSet) {
	f.StringVar(&o.metrics, "metrics-bind-address", ":8080", "serve /metrics and /statusz here; empty: nowhere")
	f.StringVar(&o.health, "health-probe-bind-address", ":8081", "serve /healthz and /readyz, and the two above, here; empty: nowhere")
	f.StringVar(&o.format, "log-format", "json", "json or text")
	f.StringVar(&o.level, "log-level", "info", "debug, info, warn or error")
}

func (o *ops) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.level)); err != nil {
		return nil, usageError{fmt.Errorf("--log-level %q: is not one of debug, info, warn, error", o.level)}
	}
	options := &slog.HandlerOptions{Level: level}
	switch o.format {
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, options)), nil
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, options)), nil
	}
	return nil, usageError{fmt.Errorf("--log-format %q: is neither json nor text", o.format)}
}

// listen opens the ports.
func (o *ops) listen(ctx context.Context) (listeners []net.Listener, err error) {
	addresses := []string{o.health}
	if o.metrics != o.health {
		addresses = append(addresses, o.metrics)
	}
	for _, address := range addresses {
		if address == "" {
			continue
		}
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			return nil, fmt.Errorf("listen for the operator (choose other addresses with --health-probe-bind-address and --metrics-bind-address): %w", err)
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

// serveFleet runs the Deployments of cfg that the topology declares, until ctx is done or the topology's source fails.
func serveFleet(ctx context.Context, t *topology, o *ops, cfg fleet.Config) error {
	log, err := o.logger()
	if err != nil {
		return err
	}
	slog.SetDefault(log)
	guard, err := t.guard()
	if err != nil {
		return err
	}
	cfg.Template.DialContext = guard.DialContext
	cfg.Region, cfg.Registry, cfg.Logger = t.region, registry.New(), log
	// The controllers ask the fleet, and the fleet reads secrets where the controllers are.
	late := &lateSecrets{}
	cfg.Secrets = late
	f := fleet.New(cfg)
	var status operated
	if cfg.Manages {
		status = f
	}
	src, err := t.open(cfg.Registry, log, status)
	if err != nil {
		return err
	}
	late.Secrets = src.secrets
	listeners, err := o.listen(ctx)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	handler := f.Handler(ctx, src.metrics)
	for _, l := range listeners {
		log.InfoContext(ctx, "serving the operator", "address", l.Addr().String())
		g.Go(func() error { return deployment.ServeHTTP(ctx, l, handler) })
	}
	g.Go(func() error { return src.run(ctx) })
	g.Go(func() error { return f.Run(ctx) })
	return g.Wait()
}

// lateSecrets is set before it is used.
type lateSecrets struct{ registry.Secrets }

// noArgs refuses arguments with a hint, since flags without dashes are a common slip.
func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("argument %q is not expected: everything is a flag", args[0])}
	}
	return nil
}
