package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// children are what this test binary is, besides the tests: by the environment variable
// that says so, whose value they are given.
var children = map[string]func(string) (exitCode int){}

func TestMain(m *testing.M) {
	for name, child := range children {
		if value := os.Getenv(name); value != "" {
			os.Exit(child(value))
		}
	}
	os.Exit(m.Run())
}

var errBroken = errors.New("broken")

func TestGroup(t *testing.T) {
	until := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	tests := []struct {
		name  string
		tasks map[string]func(context.Context) error
		stop  bool // by its context
		want  string
	}{
		{"no task", nil, false, ""},
		{"all done", map[string]func(context.Context) error{"a": func(context.Context) error { return nil }}, false, ""},
		{"stopped from outside", map[string]func(context.Context) error{"a": until, "b": until}, true, ""},
		{"one fails, the others stop", map[string]func(context.Context) error{"a": until, "b": func(context.Context) error { return errBroken }}, false, "b: broken"},
		{"one fails while stopping", map[string]func(context.Context) error{"a": func(ctx context.Context) error { <-ctx.Done(); return errBroken }, "b": until}, true, "a: broken"},
		{"a task that gives up by itself", map[string]func(context.Context) error{"a": func(context.Context) error { return context.DeadlineExceeded }, "b": until}, false, "a: context deadline exceeded"},
		{"both, the cause first", map[string]func(context.Context) error{
			"a": func(ctx context.Context) error { <-ctx.Done(); return fmt.Errorf("closing: %w", errBroken) },
			"b": func(context.Context) error { return errBroken },
		}, false, "b: broken\na: closing: broken"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				g := NewGroup(ctx)
				for name, task := range test.tasks {
					g.Go(name, task)
				}
				synctest.Wait()
				if test.stop {
					cancel()
				}
				err := g.Wait()
				if got := text(err); got != test.want {
					t.Errorf("Wait: %q, want %q", got, test.want)
				}
				if err != nil && test.name != "a task that gives up by itself" && !errors.Is(err, errBroken) {
					t.Error("the cause is lost")
				}
			})
		})
	}
}

// A task that has done its duty does not stop the others; a task may start tasks.
func TestGroupGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		g := NewGroup(ctx)
		running := false
		g.Go("first", func(context.Context) error {
			g.Go("second", func(ctx context.Context) error {
				running = true
				<-ctx.Done()
				running = false
				return nil
			})
			return nil
		})
		synctest.Wait()
		if !running {
			t.Error("the second task does not run")
		}
		cancel()
		if err := g.Wait(); err != nil || running {
			t.Errorf("%v, running %t", err, running)
		}
	})
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestSupervise(t *testing.T) {
	stubborn := func(release <-chan struct{}) func(context.Context) error {
		return func(context.Context) error { <-release; return nil }
	}
	tests := []struct {
		name    string
		run     func(context.Context) error
		signals []os.Signal
		code    int
		log     string
	}{
		{"done", func(context.Context) error { return nil }, nil, 0, ""},
		{"failed", func(context.Context) error { return errBroken }, nil, 1, "broken"},
		{"failed by a cancellation of its own", func(context.Context) error { return context.Canceled }, nil, 1, "canceled"},
		{"asked to stop", func(ctx context.Context) error { <-ctx.Done(); return nil }, []os.Signal{syscall.SIGTERM}, 0, "stopping"},
		{"asked to stop, says so", func(ctx context.Context) error { <-ctx.Done(); return fmt.Errorf("serving: %w", ctx.Err()) }, []os.Signal{syscall.SIGINT}, 0, "stopping"},
		{"failed while stopping", func(ctx context.Context) error { <-ctx.Done(); return errBroken }, []os.Signal{syscall.SIGTERM}, 1, "broken"},
		{"failed while stopping, among others", func(ctx context.Context) error {
			<-ctx.Done()
			return fmt.Errorf("serving: %w", errors.Join(ctx.Err(), errBroken))
		}, []os.Signal{syscall.SIGTERM}, 1, "broken"},
		{"asked twice", nil, []os.Signal{syscall.SIGINT, syscall.SIGTERM}, 128 + 15, "at once"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			release := make(chan struct{})
			defer close(release)
			if test.run == nil {
				test.run = stubborn(release)
			}
			signals := make(chan os.Signal, 2)
			for _, s := range test.signals {
				signals <- s
			}
			exited := -1
			var out bytes.Buffer
			code := supervise(t.Context(), slog.New(slog.NewTextHandler(&out, nil)), test.run, signals, func(code int) { exited = code })
			if code != test.code || !strings.Contains(out.String(), test.log) {
				t.Errorf("code %d, log %s", code, out.String())
			}
			if want := len(test.signals) == 2; (exited == test.code) != want {
				t.Errorf("exit was called with %d", exited)
			}
		})
	}
}

// The real signal reaches run, and only while Main runs.
func TestMainSignal(t *testing.T) {
	started := make(chan struct{})
	go func() {
		<-started
		syscall.Kill(os.Getpid(), syscall.SIGTERM)
	}()
	code := Main(t.Context(), slog.New(slog.DiscardHandler), func(ctx context.Context) error {
		close(started)
		<-ctx.Done()
		return nil
	})
	if code != 0 {
		t.Errorf("code %d", code)
	}
}

func TestNewLogger(t *testing.T) {
	for _, test := range []struct {
		format, level string
		lines         int
		want          string
	}{
		{"text", "info", 1, "level=INFO msg=yes"},
		{"", "", 1, "level=INFO msg=yes"},
		{"json", "debug", 2, `"msg":"yes"`},
		{"text", "error", 0, ""},
		{"xml", "info", 0, `unknown log format "xml"`},
		{"text", "loud", 0, `unknown log level "loud"`},
	} {
		var out bytes.Buffer
		log, err := NewLogger(&out, test.format, test.level)
		if err != nil {
			if !strings.Contains(err.Error(), test.want) || test.want == "" {
				t.Errorf("%+v: %v", test, err)
			}
			continue
		}
		log.Debug("no")
		log.Info("yes")
		if got := strings.Count(out.String(), "\n"); got != test.lines || !strings.Contains(out.String(), test.want) {
			t.Errorf("%+v: %s", test, out.String())
		}
	}
}

func TestAdmin(t *testing.T) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "entente_answer"}, func() float64 { return 42 }))
	var mu sync.Mutex
	notReady := errors.New("no SVID yet")
	admin, err := NewAdmin("127.0.0.1:0", func() error { mu.Lock(); defer mu.Unlock(); return notReady }, registry)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- admin.Run(ctx) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	ask := func(method, path string, status int, want string) {
		t.Helper()
		request, err := http.NewRequest(method, "http://"+admin.Addr()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err != nil || response.StatusCode != status || !strings.Contains(string(body), want) {
			t.Errorf("%s %s: %s %s %v", method, path, response.Status, body, err)
		}
	}
	ask("GET", "/healthz", 200, "ok")
	ask("HEAD", "/healthz", 200, "")
	ask("GET", "/readyz", 503, "not ready: no SVID yet")
	mu.Lock()
	notReady = nil
	mu.Unlock()
	ask("GET", "/readyz", 200, "ready")
	ask("GET", "/metrics", 200, "entente_answer 42")
	for _, path := range []string{"/", "/debug/pprof/", "/debug/vars", "/healthz/x", "/metrics/"} {
		ask("GET", path, 404, "")
	}
	ask("POST", "/healthz", 405, "")

	if _, err := NewAdmin(admin.Addr(), nil, nil); err == nil || !strings.Contains(err.Error(), "already in use") {
		t.Errorf("a second listener: %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := client.Get("http://" + admin.Addr() + "/healthz"); err == nil {
		t.Error("it still answers")
	}
}

// Without readiness and metrics of its own a process is ready and has no metrics.
// Whoever opens connections and says nothing has his share of the listener; it answers
// others.
func TestAdminAnswersBesideSilentConnections(t *testing.T) {
	admin, err := NewAdmin("127.0.0.1:0", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- admin.Run(ctx) }()
	defer func() { cancel(); <-done }()
	var silent []net.Conn
	for range 300 {
		conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.0.0.2")}}).Dial("tcp", admin.Addr())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		silent = append(silent, conn)
	}
	client := &http.Client{Timeout: 5 * time.Second}
	answer, err := client.Get("http://" + admin.Addr() + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		t.Error(answer.Status)
	}
	open := 0
	for _, conn := range silent {
		conn.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
		if _, err := conn.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			open++
		}
	}
	if open > 64 || open == 0 {
		t.Errorf("%d silent connections of one address are open, its share is 64", open)
	}
}

func TestAdminBare(t *testing.T) {
	admin, err := NewAdmin("127.0.0.1:0", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.listener.Close()
	for path, status := range map[string]int{"/readyz": 200, "/metrics": 404} {
		w := &recorder{header: http.Header{}, status: 200}
		r, err := http.NewRequest("GET", path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if admin.handler.ServeHTTP(w, r); w.status != status {
			t.Errorf("%s: %d", path, w.status)
		}
	}
}

type recorder struct {
	header http.Header
	status int
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(p []byte) (int, error) { return len(p), nil }

func TestListen(t *testing.T) {
	taken, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, test := range []struct{ addr, want string }{
		{taken.Addr().String(), "address " + taken.Addr().String() + " is already in use: "},
		{"192.0.2.1:7443", "address 192.0.2.1:7443 cannot be assigned: "}, // RFC 5737: nobody has it
		{"127.0.0.1", "not of the form host:port"},
		{"127.0.0.1:http-no-such", "cannot listen on address"},
		{"127.0.0.1:99999", "cannot listen on address"},
	} {
		listener, err := Listen(test.addr)
		if err == nil {
			listener.Close()
		}
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.addr, err, test.want)
		}
	}
	if os.Getuid() != 0 && runtime.GOOS == "linux" {
		if start, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start"); err == nil && strings.TrimSpace(string(start)) == "1024" {
			if listener, err := Listen("127.0.0.1:1"); err == nil {
				listener.Close()
			} else if !strings.Contains(err.Error(), "no permission") {
				t.Error(err)
			}
		}
	}
}

func TestListenUnix(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s.sock")
	first, err := ListenUnix(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(path); err != nil || info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if first.Addr().String() != path {
		t.Errorf("address %s", first.Addr())
	}
	go func() {
		if c, err := first.Accept(); err == nil {
			if _, ok := c.(*net.UnixConn); !ok {
				t.Errorf("accepted a %T", c)
			}
			c.Close()
		}
	}()
	if c, err := net.Dial("unix", path); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}

	if _, err := ListenUnix(path, 0o600); err == nil || !strings.Contains(err.Error(), "another process answers on it") {
		t.Errorf("over a living one: %v", err)
	}
	// A process that dies leaves its socket behind.
	first.(*unixListener).UnixListener.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Fatal("the socket is gone before its time")
	}
	second, err := ListenUnix(path, 0o666)
	if err != nil {
		t.Fatalf("over a dead one: %v", err)
	}
	if info, err := os.Lstat(path); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("%v, %v", info, err)
	}
	first.Close() // late: must not take the second's away
	if _, err := os.Lstat(path); err != nil {
		t.Error("closing the first removed the socket of the second")
	}
	second.Close()
	second.Close()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ path, want string }{
		{file, "is no socket"},
		{dir, "is no socket"},
		{filepath.Join(dir, "none", "s.sock"), "does not exist"},
		{filepath.Join(dir, strings.Repeat("x", 110)), "choose a shorter one"},
	} {
		if l, err := ListenUnix(test.path, 0o600); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.path, err, test.want)
			if err == nil {
				l.Close()
			}
		}
	}
	if content, err := os.ReadFile(file); err != nil || string(content) != "precious" {
		t.Errorf("%s, %v", content, err)
	}
}

// Of many that start at once over a dead socket, one wins.
func TestListenUnixRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	dead, err := ListenUnix(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	dead.(*unixListener).UnixListener.Close()
	winners := make(chan net.Listener, 20)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if l, err := ListenUnix(path, 0o600); err == nil {
				winners <- l
			}
		})
	}
	all.Wait()
	if len(winners) != 1 {
		t.Errorf("%d won", len(winners))
	}
	for range len(winners) {
		(<-winners).Close()
	}
}

func TestWriteFileAtomic(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state")
	for _, mode := range []fs.FileMode{0o600, 0o644} {
		content := fmt.Appendf(nil, "content %o", mode)
		if err := WriteFileAtomic(path, content, mode); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode() != mode {
			t.Errorf("%v, %v", info, err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s, %v", got, err)
		}
	}
	if err := WriteFileAtomic(filepath.Join(dir, "none", "state"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "cannot write") {
		t.Error(err)
	}
	sub := filepath.Join(dir, "sub")
	if err := os.MkdirAll(filepath.Join(sub, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFileAtomic(sub, []byte("x"), 0o600); err == nil {
		t.Error("a directory was replaced")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 2 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// A reader sees one content or the other, whole.
func TestWriteFileAtomicReaders(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	contents := [][]byte{bytes.Repeat([]byte("a"), 100_000), bytes.Repeat([]byte("b"), 50_000)}
	if err := WriteFileAtomic(path, contents[0], 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 50 {
			if err := WriteFileAtomic(path, contents[i%2], 0o600); err != nil {
				t.Error(err)
			}
		}
	}()
	for {
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, contents[0]) && !bytes.Equal(got, contents[1]) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		select {
		case <-done:
			return
		case <-time.After(time.Millisecond):
		}
	}
}

// The plain words for a full disk, from a device that is always full.
func TestDiskFull(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip("this system has no /dev/full")
	}
	err = fill(full, []byte("x"), 0o600)
	if !errors.Is(err, syscall.ENOSPC) {
		t.Skipf("writing to /dev/full: %v", err)
	}
	err = explain("/var/lib/entente/state", err)
	if want := "cannot write /var/lib/entente/state: no space left on the disk that holds /var/lib/entente"; !strings.HasPrefix(err.Error(), want) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%v, want %q", err, want)
	}
}
