package main

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/dbcontroller/db-controller/nodemanager"
	"github.com/dbcontroller/db-controller/nodemanager/lease"
	"github.com/dbcontroller/db-controller/registry"
)

// replica says how this process shares the work on a Deployment with the other managers of its region.
type replica struct {
	nodes     int
	timing    nodemanager.Timing
	name      string
	namespace string
}

func (r *replica) flags(f *pflag.FlagSet) {
	f.IntVar(&r.nodes, "nodes", 1, "`nodes` of each kind in this process; each works on its own part of the shards")
	f.DurationVar(&r.timing.Lease, "lease-duration", 15*time.Second, "a replica that has been silent for so long is taken for dead, and its shards go to others; whole seconds")
	f.DurationVar(&r.timing.RenewDeadline, "renew-deadline", 10*time.Second, "a replica that could not renew its Leases for so long stops its nodes by itself")
	f.DurationVar(&r.timing.RetryPeriod, "retry-period", 2*time.Second, "time between two renewals")
	f.StringVar(&r.name, "replica-name", "", "`name` of this process among the managers of the region, no two the same; default $POD_NAME, or the host's name and a random number")
	f.StringVar(&r.namespace, "lease-namespace", "", "`namespace` of the replicas' Leases; default that of the pod, or --leader-election-namespace, or that of the kubeconfig")
}

// membership returns where replicas meet: in Leases where the topology is in Kubernetes, else in this process.
func (r *replica) membership(t *topology) (func(of registry.Key, kinds []string) (nodemanager.Membership, error), error) {
	timing, err := r.timing.WithDefaults()
	if err != nil {
		return nil, usageError{fmt.Errorf("--lease-duration, --renew-deadline, --retry-period: %w", err)}
	}
	if r.nodes < 1 {
		return nil, usageError{fmt.Errorf("--nodes %d: must be at least 1", r.nodes)}
	}
	name := cmp.Or(r.name, os.Getenv("POD_NAME"), hostName())
	if t.manifests != "" {
		return func(registry.Key, []string) (nodemanager.Membership, error) {
			local, err := nodemanager.NewLocal(timing)
			if err != nil {
				return nil, err
			}
			return local.Member(name), nil
		}, nil
	}
	if timing.Lease < time.Second || timing.Lease%time.Second != 0 {
		return nil, usageError{fmt.Errorf("--lease-duration %v: must be whole seconds, for example 15s", timing.Lease)}
	}
	return func(of registry.Key, kinds []string) (nodemanager.Membership, error) {
		client, err := t.restConfig()
		if err != nil {
			return nil, err
		}
		return lease.New(lease.Config{
			Client: client, Namespace: cmp.Or(r.namespace, podNamespace(), t.electionNS, t.namespaceOfKubeconfig()),
			Prefix: lease.Prefix(cmp.Or(t.electionID, "db-controller"), of.Service, of.Region), Replica: name, Kinds: kinds, Timing: timing,
		})
	}, nil
}

// settle is how long a leader waits for more replicas that start together.
func (r *replica) settle(t *topology) time.Duration {
	if t.manifests != "" {
		return 0
	}
	return r.timing.RetryPeriod / 2
}

func hostName() string {
	name, err := os.Hostname()
	if err != nil {
		name = "manager"
	}
	return fmt.Sprintf("%s-%08x", name, rand.Uint32())
}

// podNamespace returns the namespace of the pod that this process runs in; empty outside of a cluster.
func podNamespace() string {
	if ns := os.Getenv("POD_NAMESPACE"); ns != "" {
		return ns
	}
	ns, err := os.ReadFile("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(ns))
}

func (t *topology) namespaceOfKubeconfig() string {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = t.kubeconfig
	ns, _, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{}).Namespace()
	if err != nil {
		return ""
	}
	return ns
}
