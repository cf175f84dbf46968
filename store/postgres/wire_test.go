package postgres_test

import (
	"encoding/binary"
	"io"
	"net"
	"net/url"
	"sync"
	"sync/atomic"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// wire passes connections through to PostgreSQL and counts what the server says.
type wire struct {
	dsn             string
	ready, complete atomic.Int64
}

type counts struct{ ready, complete int64 }

func (w *wire) counts() counts { return counts{w.ready.Load(), w.complete.Load()} }

// tap returns a wire to the server of dsn, which ends with the spec.
func tap(dsn string) *wire {
	GinkgoHelper()
	conf, err := pgx.ParseConfig(dsn)
	Expect(err).NotTo(HaveOccurred())
	network, addr := pgconn.NetworkAddress(conf.Host, conf.Port)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	Expect(err).NotTo(HaveOccurred())
	u := url.URL{Scheme: "postgres", User: url.User(conf.User), Host: l.Addr().String(), Path: conf.Database, RawQuery: "sslmode=disable"}
	w := &wire{dsn: u.String()}
	var wg sync.WaitGroup
	DeferCleanup(func() { _ = l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial(network, addr)
			if err != nil {
				_ = client.Close()
				continue
			}
			wg.Go(func() { _, _ = io.Copy(server, client); _ = server.Close() })
			wg.Go(func() { w.count(client, server); _ = client.Close() })
		}
	})
	return w
}

// count copies the server's messages: a type byte, and a length that includes itself.
func (w *wire) count(client io.Writer, server io.Reader) {
	head := make([]byte, 5)
	for {
		if _, err := io.ReadFull(server, head); err != nil {
			return
		}
		switch head[0] {
		case 'Z':
			w.ready.Add(1)
		case 'C':
			w.complete.Add(1)
		}
		if _, err := client.Write(head); err != nil {
			return
		}
		if _, err := io.CopyN(client, server, int64(binary.BigEndian.Uint32(head[1:]))-4); err != nil {
			return
		}
	}
}
