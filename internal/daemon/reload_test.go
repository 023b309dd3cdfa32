package daemon

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A SIGHUP that comes before Run is answered by it, and one that fails ends nothing.
func TestReload(t *testing.T) {
	var calls atomic.Int32
	r := OnHangup("keys", func() error {
		if calls.Add(1) == 2 {
			return errBroken
		}
		return nil
	})
	hangup := func(want int32) {
		t.Helper()
		syscall.Kill(os.Getpid(), syscall.SIGHUP)
		for begin := time.Now(); calls.Load() != want; time.Sleep(time.Millisecond) {
			if time.Since(begin) > 5*time.Second {
				t.Fatalf("%d calls, want %d", calls.Load(), want)
			}
		}
	}
	syscall.Kill(os.Getpid(), syscall.SIGHUP)
	for begin := time.Now(); len(r.hangups) == 0; time.Sleep(time.Millisecond) {
		if time.Since(begin) > 5*time.Second {
			t.Fatal("SIGHUP does not come")
		}
	}
	var log bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx, slog.New(slog.NewTextHandler(&log, nil))) }()
	for begin := time.Now(); calls.Load() != 1; time.Sleep(time.Millisecond) {
		if time.Since(begin) > 5*time.Second {
			t.Fatal("the SIGHUP of before Run is lost")
		}
	}
	hangup(2)
	hangup(3)
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if text := log.String(); strings.Count(text, "level=INFO") != 2 || strings.Count(text, "level=ERROR") != 1 || !strings.Contains(text, "what=keys error=broken") {
		t.Errorf("log:\n%s", text)
	}
}
