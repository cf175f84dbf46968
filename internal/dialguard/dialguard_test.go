package dialguard

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// network is a resolver and a dialer that only take notes.
type network struct {
	names  map[string][]string
	looked []string
	dialed []string
	fail   map[string]bool
}

func (n *network) config() Config {
	return Config{
		LookupNetIP: func(_ context.Context, _, host string) ([]netip.Addr, error) {
			n.looked = append(n.looked, host)
			var all []netip.Addr
			for _, a := range n.names[host] {
				all = append(all, netip.MustParseAddr(a))
			}
			return all, nil
		},
		DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
			n.dialed = append(n.dialed, addr)
			if n.fail[addr] {
				return nil, errors.New("refused")
			}
			return nil, nil
		},
	}
}

// S6: what must never be dialed, in all spellings.
func TestRefused(t *testing.T) {
	hosts := []string{
		"", "0.0.0.0", "0.1.2.3", "::", "127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1", "::127.0.0.1",
		"169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "2002:a9fe:a9fe::1", "::a9fe:a9fe",
		"fe80::1", "fe80::1%eth0", "fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16",
		"224.0.0.1", "239.255.255.255", "ff02::1", "255.255.255.255",
		"2130706433", "0x7f000001", "0X7F.1", "017700000001", "127.1", "0177.0.0.1", "10.0.0.1.5", "169.254.43518", "127.0.0.1.",
		"10.96.0.1", "::ffff:10.96.0.1", "kubernetes.example.com", "api.internal",
		"metadata.internal", "mixed.internal",
	}
	for _, host := range hosts {
		t.Run(host, func(t *testing.T) {
			n := &network{names: map[string][]string{
				"metadata.internal": {"169.254.169.254"}, "mixed.internal": {"10.1.2.3", "::ffff:169.254.169.254"},
				"kubernetes.example.com": {"192.0.2.7"}, "api.internal": {"192.0.2.7"},
			}}
			cfg := n.config()
			cfg.Denied = []string{"10.96.0.1", "kubernetes.example.com"}
			_, err := New(cfg).DialContext(t.Context(), "tcp", net.JoinHostPort(host, "8443"))
			refusal, ok := errors.AsType[*Error](err)
			if !ok || refusal.Host != host {
				t.Errorf("DialContext = %v, want a refusal", err)
			}
			if len(n.dialed) > 0 {
				t.Errorf("dialed %v", n.dialed)
			}
			for _, resolved := range n.names[host] {
				if strings.Contains(err.Error(), resolved) {
					t.Errorf("%q tells what the name resolves to", err)
				}
			}
		})
	}
	t.Run("a Unix socket", func(t *testing.T) {
		n := &network{}
		if _, err := New(n.config()).DialContext(t.Context(), "unix", "/run/docker.sock:1"); err == nil || len(n.dialed) > 0 {
			t.Errorf("DialContext = %v, dialed %v", err, n.dialed)
		}
	})
}

func TestPermitted(t *testing.T) {
	n := &network{names: map[string][]string{"eu.example.com": {"192.0.2.1", "2001:db8::1"}}, fail: map[string]bool{"192.0.2.1:443": true}}
	cases := []struct {
		situation, host string
		change          func(*Config)
		want            []string
	}{
		{"a private address", "10.1.2.3", nil, []string{"10.1.2.3:443"}},
		{"an address of IPv6", "fd12::1", nil, []string{"[fd12::1]:443"}},
		{"IPv4 in IPv6", "::ffff:10.1.2.3", nil, []string{"10.1.2.3:443"}},
		{"a name: its addresses in turn, never the name", "eu.example.com", nil, []string{"192.0.2.1:443", "[2001:db8::1]:443"}},
		{"loopback where it may be", "127.0.0.1", func(c *Config) { c.AllowLoopback = true }, []string{"127.0.0.1:443"}},
		{"loopback of IPv6 where it may be", "::1", func(c *Config) { c.AllowLoopback = true }, []string{"[::1]:443"}},
		{"inside of the networks of peers", "10.1.2.3", func(c *Config) { c.Peers = prefixes("10.0.0.0/8") }, []string{"10.1.2.3:443"}},
		{"outside of the networks of peers", "192.0.2.9", func(c *Config) { c.Peers = prefixes("10.0.0.0/8") }, nil},
		{"a name that is partly outside", "eu.example.com", func(c *Config) { c.Peers = prefixes("192.0.2.0/24") }, nil},
		{"networks of peers permit nothing that is always refused", "169.254.169.254", func(c *Config) { c.Peers = prefixes("0.0.0.0/0") }, nil},
		{"metadata is refused where loopback is not", "169.254.169.254", func(c *Config) { c.AllowLoopback = true }, nil},
		{"a name without addresses", "nowhere.example.com", nil, nil},
	}
	for _, c := range cases {
		t.Run(c.situation, func(t *testing.T) {
			n.dialed = nil
			cfg := n.config()
			if c.change != nil {
				c.change(&cfg)
			}
			_, err := New(cfg).DialContext(t.Context(), "tcp", net.JoinHostPort(c.host, "443"))
			if (err == nil) != (c.want != nil) || !slices.Equal(n.dialed, c.want) {
				t.Errorf("DialContext = %v, dialed %v, want %v", err, n.dialed, c.want)
			}
		})
	}
}

func prefixes(text ...string) (all []netip.Prefix) {
	for _, p := range text {
		all = append(all, netip.MustParsePrefix(p))
	}
	return all
}

// S6, rebinding: the address that was judged is the one that is dialed, however often the name changes.
func TestRebinding(t *testing.T) {
	n := &network{names: map[string][]string{"eu.example.com": {"192.0.2.1"}}}
	cfg := n.config()
	lookup := cfg.LookupNetIP
	cfg.LookupNetIP = func(ctx context.Context, network, host string) ([]netip.Addr, error) {
		defer func() { n.names["eu.example.com"] = []string{"169.254.169.254"} }()
		return lookup(ctx, network, host)
	}
	g := New(cfg)
	if _, err := g.DialContext(t.Context(), "tcp", "eu.example.com:443"); err != nil {
		t.Fatal(err)
	}
	if _, err := g.DialContext(t.Context(), "tcp", "eu.example.com:443"); err == nil {
		t.Error("the second connection was opened")
	}
	if want := []string{"192.0.2.1:443"}; !slices.Equal(n.dialed, want) || len(n.looked) != 2 {
		t.Errorf("dialed %v, want %v; looked up %v, want one look per connection", n.dialed, want, n.looked)
	}
}

// S6: a listener on this machine sees nobody, by any of its names.
func TestNoPacketReachesLoopback(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan struct{}, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- struct{}{}
			c.Close()
		}
	}()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	dial := func(g *Guard, host string) error {
		c, err := g.DialContext(t.Context(), "tcp", net.JoinHostPort(host, port))
		if err == nil {
			c.Close()
		}
		return err
	}
	for _, host := range []string{"127.0.0.1", "localhost", "::ffff:127.0.0.1", "0.0.0.0", "", "::", "127.1", "2130706433"} {
		if err := dial(New(Config{}), host); err == nil {
			t.Errorf("%q was reached", host)
		}
	}
	if n := len(accepted); n > 0 {
		t.Errorf("%d connections came in", n)
	}
	if err := dial(New(Config{AllowLoopback: true}), "127.0.0.1"); err != nil {
		t.Errorf("with AllowLoopback: %v", err)
	}
	<-accepted
	l.Close()
	<-done
}
