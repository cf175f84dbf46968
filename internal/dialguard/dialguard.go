// Package dialguard decides which addresses a connection to another Deployment may go to.
//
// The endpoint of a Deployment is written by whoever may write that resource, and the process that dials it stands elsewhere in the network than its
// author. So a Guard refuses what no Deployment can be: addresses of this machine, of its link and its cloud's metadata, and the Kubernetes API server. A name is
// resolved once, each of its addresses is judged, and a judged address is what is dialed: a name that leads elsewhere the next time gains nothing.
//
// What is refused is never sent a packet. The reasons are in docs/decisions/0018-endpoints-of-deployments.md.
package dialguard

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Config of a Guard.
type Config struct {
	// AllowLoopback permits this machine's own addresses: for demos and tests.
	AllowLoopback bool
	// Peers are the only addresses that are permitted; empty is all that are not refused. It permits nothing that is always refused.
	Peers []netip.Prefix
	// Denied are hosts, addresses or names, whose addresses are refused too: those of the Kubernetes API server.
	Denied []string
	// LookupNetIP resolves names. Nil: net.DefaultResolver.
	LookupNetIP func(ctx context.Context, network, host string) ([]netip.Addr, error)
	// DialContext opens a connection to an address that was permitted, written as numbers. Nil: a net.Dialer with a timeout of 5 s.
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)
}

// Guard dials. It is safe for concurrent use.
type Guard struct{ cfg Config }

// New returns a Guard.
func New(cfg Config) *Guard {
	if cfg.LookupNetIP == nil {
		cfg.LookupNetIP = net.DefaultResolver.LookupNetIP
	}
	if cfg.DialContext == nil {
		cfg.DialContext = (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext
	}
	return &Guard{cfg}
}

// Error is the refusal of an endpoint. Its text says what its author wrote, and not what that resolved to.
type Error struct {
	// Host of the endpoint.
	Host string
}

// Error returns one line, with what to do.
func (e *Error) Error() string {
	return fmt.Sprintf("spec.endpoint: host %q is not an address where a Deployment may be: name one that other regions reach; "+
		"the administrator of this process permits more with --peer-cidrs and --allow-loopback-peers", e.Host)
}

// DialContext is net.Dialer.DialContext for TCP to permitted addresses. It returns an *Error, and sends nothing, if any address of the host is refused.
func (g *Guard) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(network, "tcp") {
		return nil, &Error{Host: host}
	}
	addrs, err := g.resolve(ctx, host)
	if err != nil {
		return nil, err
	}
	denied := g.denied(ctx)
	for _, a := range addrs {
		if !g.permits(a, denied) {
			return nil, &Error{Host: host}
		}
	}
	var errs []error
	for _, a := range addrs {
		conn, err := g.cfg.DialContext(ctx, network, net.JoinHostPort(a.String(), port))
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

// resolve returns at least one address.
func (g *Guard) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		if a.Zone() != "" { // a link is no place for a Deployment
			return nil, &Error{Host: host}
		}
		return []netip.Addr{a.Unmap()}, nil
	}
	// An empty host is this machine to a dialer, and a number in another spelling (2130706433, 0x7f000001, 127.1) an address to some resolvers.
	if host == "" || endsInNumber(host) {
		return nil, &Error{Host: host}
	}
	addrs, err := g.cfg.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("look up %s: it has no addresses", host)
	}
	for i, a := range addrs {
		addrs[i] = a.Unmap()
	}
	return addrs, nil
}

// endsInNumber says whether the last label of a host is a number, which no top-level domain is.
func endsInNumber(host string) bool {
	host = strings.TrimSuffix(host, ".")
	last := strings.ToLower(host[strings.LastIndexByte(host, '.')+1:])
	if hex, ok := strings.CutPrefix(last, "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return strings.Trim(last, "0123456789") == ""
}

// denied returns the addresses of cfg.Denied. A name that cannot be resolved now has none that could be reached by it either.
func (g *Guard) denied(ctx context.Context) (all []netip.Addr) {
	for _, host := range g.cfg.Denied {
		addrs, err := g.resolve(ctx, host)
		if err == nil {
			all = append(all, addrs...)
		}
	}
	return all
}

func (g *Guard) permits(a netip.Addr, denied []netip.Addr) bool {
	return !slices.ContainsFunc(spellings(a), func(a netip.Addr) bool {
		return within(a, never) || a.IsLoopback() && !g.cfg.AllowLoopback || slices.Contains(denied, a)
	}) && (len(g.cfg.Peers) == 0 || within(a, g.cfg.Peers))
}

func within(a netip.Addr, prefixes []netip.Prefix) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// never are the addresses that are refused whatever the configuration.
var never = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), // unspecified: this machine
	netip.MustParsePrefix("::/128"),
	netip.MustParsePrefix("169.254.0.0/16"), // link-local, and most clouds' metadata
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("224.0.0.0/4"), // multicast
	netip.MustParsePrefix("ff00::/8"),
	netip.MustParsePrefix("255.255.255.255/32"), // broadcast
	// Metadata of clouds that is elsewhere.
	netip.MustParsePrefix("fd00:ec2::/32"),
	netip.MustParsePrefix("fd20:ce::254/128"),
	netip.MustParsePrefix("100.100.100.200/32"),
	netip.MustParsePrefix("168.63.129.16/32"),
	netip.MustParsePrefix("192.0.0.192/32"),
}

// embedded are ranges of IPv6 whose addresses lead to the IPv4 address at an offset inside of them.
var embedded = []struct {
	prefix netip.Prefix
	offset int
}{
	{netip.MustParsePrefix("::/96"), 12},          // IPv4-compatible
	{netip.MustParsePrefix("64:ff9b::/96"), 12},   // NAT64
	{netip.MustParsePrefix("64:ff9b:1::/48"), 12}, // local NAT64
	{netip.MustParsePrefix("2002::/16"), 2},       // 6to4
}

// spellings are a, and the IPv4 address inside of it.
func spellings(a netip.Addr) []netip.Addr {
	all := []netip.Addr{a}
	for _, e := range embedded {
		if e.prefix.Contains(a) && a != netip.IPv6Loopback() {
			b := a.As16()
			all = append(all, netip.AddrFrom4([4]byte(b[e.offset:e.offset+4])))
		}
	}
	return all
}
