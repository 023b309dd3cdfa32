package simnet

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func pair(t *testing.T, n *Network) (a, b net.Conn) {
	t.Helper()
	l, err := n.Listen("b", "b:1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	accepted := make(chan net.Conn, 1)
	go func() {
		c, _ := l.Accept()
		accepted <- c
	}()
	if a, err = n.Dial(t.Context(), "a", "b:1"); err != nil {
		t.Fatal(err)
	}
	return a, <-accepted
}

// received is what arrives, and after how long.
func received(t *testing.T, c net.Conn, n int) (string, time.Duration) {
	t.Helper()
	from := time.Now()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
	return string(b), time.Since(from)
}

func TestDelayAndCuts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New(func(from, to string) time.Duration { return 10 * time.Millisecond })
		a, b := pair(t, n)
		a.Write([]byte("one"))
		if got, after := received(t, b, 3); got != "one" || after != 10*time.Millisecond {
			t.Errorf("%q after %v", got, after)
		}
		// One direction is cut: what is sent is kept, the other direction works.
		n.Cut("a", "b")
		a.Write([]byte("two"))
		b.Write([]byte("back"))
		if got, _ := received(t, a, 4); got != "back" {
			t.Errorf("%q", got)
		}
		b.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("over a cut: %v", err)
		}
		b.SetReadDeadline(time.Time{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := n.Dial(ctx, "a", "b:1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a dial over a cut: %v", err)
		}
		time.AfterFunc(time.Second, n.MendAll)
		if got, after := received(t, b, 3); got != "two" || after != time.Second {
			t.Errorf("%q after %v", got, after)
		}
		if _, err := n.Dial(t.Context(), "a", "c:1"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("nobody listens: %v", err)
		}
		// The end of a connection has to cross the network, too.
		n.Cut("b", "a")
		b.Close()
		a.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%v", err)
		}
		n.Mend("b", "a")
		a.SetReadDeadline(time.Time{})
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%v", err)
		}
		if _, err := a.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("%v", err)
		}
		a.Close()
	})
}
