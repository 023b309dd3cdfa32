package admission

import (
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"
)

// dialer connects from addresses of this host. closed tells whether the other end gave a
// connection up within a moment.
func dialFrom(t *testing.T, ln net.Listener, address string) net.Conn {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
	conn, err := dialer.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func closed(conn net.Conn, within time.Duration) bool {
	conn.SetReadDeadline(time.Now().Add(within))
	_, err := io.Copy(io.Discard, conn)
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

// Connections hold a place until they end; a peer that is known keeps its own, and makes
// room among the strangers.
func TestListener(t *testing.T) {
	t.Parallel()
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var cut atomic.Int64
	ln := ListenTwice(raw, Limits{Most: 4, PerSource: 2, Patience: Never}, Limits{Most: 3, PerSource: 2, Patience: Never}, func() { cut.Add(1) })
	defer ln.Close()
	accepted := make(chan *Conn, 100)
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- conn.(*Conn)
		}
	}()
	first, second := dialFrom(t, raw, "127.0.0.1"), dialFrom(t, raw, "127.0.0.1")
	one, two := <-accepted, <-accepted
	if third := dialFrom(t, raw, "127.0.0.1"); !closed(third, 5*time.Second) || cut.Load() != 1 {
		t.Fatalf("a third connection of one address was accepted; %d are counted", cut.Load())
	}
	other := dialFrom(t, raw, "127.0.0.2")
	three := <-accepted
	if !one.Seat() || !two.Seat() || !one.Seat() || ln.places.Len() != 1 || ln.seats.Len() != 2 {
		t.Fatalf("%d strangers, %d known", ln.places.Len(), ln.seats.Len())
	}
	dialFrom(t, raw, "127.0.0.1")
	four := <-accepted
	seated, after := four.Seat(), four.Seat()
	if seated || after || cut.Load() != 2 {
		t.Errorf("a third known connection of one address has a seat; %d are counted", cut.Load())
	} else {
		four.Close()
	}
	if !three.Seat() {
		t.Error("control: another address finds no seat")
	}
	// A source that holds less takes the place of the one that holds most.
	dialFrom(t, raw, "127.0.0.3")
	if five := <-accepted; !five.Seat() || !closed(first, 5*time.Second) || closed(second, 50*time.Millisecond) || closed(other, 50*time.Millisecond) {
		t.Error("not the oldest connection of the busiest address made room")
	}
	for _, conn := range []*Conn{one, two, three} {
		conn.Close()
		conn.Close()
	}
	if ln.places.Len() != 0 || ln.seats.Len() != 1 {
		t.Errorf("%d strangers, %d known after they ended", ln.places.Len(), ln.seats.Len())
	}
}
