package dataplane

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/entente-mesh/entente/internal/admission"
	"github.com/entente-mesh/entente/internal/peer"
)

func withLimits(strangers, peers admission.Limits) option {
	return func(w *world) { w.strangers, w.peers = strangers, peers }
}

// open tells whether the other end keeps a connection that says nothing.
func open(conn net.Conn) bool {
	conn.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	_, err := io.ReadFull(conn, make([]byte, 1<<10))
	return errors.Is(err, os.ErrDeadlineExceeded)
}

// An address that opens connections without end, silent ones or with an SVID, has its
// share of an mTLS door. What others have open stays, and they are served.
func TestOneAddressFillsNoDoor(t *testing.T) {
	w := newWorld(t, withLimits(admission.Share(80, time.Second), admission.Share(40, admission.Never)))
	for _, door := range []struct {
		name string
		*process
		sni, path string
	}{
		{"inbound", w.banking.sidecars[0], "accounts.banking.example", "/ledger"},
		{"gateway", w.banking.gateways[0], "banking.example", "/ledger"},
	} {
		t.Run(door.name, func(t *testing.T) {
			dial := func(address string) net.Conn {
				conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}).Dial("tcp", door.addr)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { conn.Close() })
				return conn
			}
			config := peer.ClientTLS(w.svid(w.banking, door.path), w.banking.own, peer.AnyVerified(), "h2")
			config.ServerName = door.sni
			shake := func(conn net.Conn) bool {
				secure := tls.Client(conn, config)
				secure.SetDeadline(time.Now().Add(5 * time.Second))
				_, err := io.ReadFull(secure, make([]byte, 9)) // SETTINGS
				return err == nil
			}
			good := dial("127.0.0.9")
			if !shake(good) {
				t.Fatal("control: a member is not served")
			}
			count := func(conns []net.Conn) (n int) {
				for _, conn := range conns {
					if open(conn) {
						n++
					}
				}
				return n
			}
			var silent []net.Conn
			for range 100 {
				silent = append(silent, dial("127.0.0.2"))
			}
			if n := count(silent); n > 20 || n == 0 {
				t.Errorf("%d silent connections of one address are open, its share is 20", n)
			}
			served := 0
			for range 30 {
				if shake(dial("127.0.0.3")) {
					served++
				}
			}
			if served != 10 {
				t.Errorf("%d verified connections of one address are open, its share is 10", served)
			}
			if !shake(dial("127.0.0.4")) {
				t.Error("another member is not served beside them")
			}
			if !open(good) {
				t.Error("a connection that was open has ended")
			}
		})
	}
}
