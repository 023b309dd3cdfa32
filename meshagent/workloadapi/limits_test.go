package workloadapi

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/entente-mesh/entente/ca/catest"
)

// tally is how calls ended.
type tally struct{ served, limited, told, other atomic.Int64 }

func (t *tally) add(err error) {
	st := status.Convert(err)
	switch {
	case err == nil:
		t.served.Add(1)
	case st.Code() == codes.ResourceExhausted:
		t.limited.Add(1)
		for _, detail := range st.Details() {
			if info, ok := detail.(*errdetails.RetryInfo); ok && info.GetRetryDelay().AsDuration() > 0 {
				t.told.Add(1)
			}
		}
	default:
		t.other.Add(1)
		fmt.Fprintln(os.Stderr, err)
	}
}

func (t *tally) String() string {
	return fmt.Sprint(t.served.Load(), t.limited.Load(), t.told.Load(), t.other.Load())
}

// The test binary is also a greedy workload, and one that hoards streams. It says how
// it fared once its standard input ends, or for a hoarder when it has all it gets.
func attack(kind, socket string) {
	ended := make(chan struct{})
	go func() {
		io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	var result tally
	ctx := withHeader(context.Background(), "true")
	connect := func() workload.SpiffeWorkloadAPIClient {
		conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			panic(err)
		}
		return workload.NewSpiffeWorkloadAPIClient(conn)
	}
	if count, err := strconv.Atoi(kind); err == nil {
		var opening sync.WaitGroup
		for range 6 {
			api := connect()
			opening.Go(func() {
				for range count / 6 {
					result.add(first(api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})))
				}
			})
		}
		opening.Wait()
		fmt.Println(&result)
		<-ended
		return
	}
	var calls sync.WaitGroup
	for range 8 {
		api := connect()
		for range 8 {
			calls.Go(func() {
				for {
					select {
					case <-ended:
						return
					default:
					}
					ctx, cancel := context.WithCancel(ctx)
					result.add(first(api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})))
					cancel()
				}
			})
		}
	}
	calls.Wait()
	fmt.Println(&result)
}

// attacker starts one, as a process of its own.
func attacker(t *testing.T, kind, socket string) (cmd *exec.Cmd, result func() (served, limited, told, other int), end func()) {
	t.Helper()
	cmd = exec.Command(myself(t))
	cmd.Env = append(os.Environ(), "ENTENTE_TEST_SOCKET="+socket, "ENTENTE_TEST_ATTACK="+kind)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = sync.OnceFunc(func() { stdin.Close() })
	t.Cleanup(func() {
		end()
		cmd.Process.Kill()
		cmd.Wait()
	})
	lines := bufio.NewReader(stdout)
	return cmd, func() (served, limited, told, other int) {
		line, _ := lines.ReadString('\n')
		if n, err := fmt.Sscan(line, &served, &limited, &told, &other); n != 4 {
			t.Fatalf("the attacker said %q, %v", line, err)
		}
		return
	}, end
}

// anyProcess is an entry for every process of this user.
func anyProcess(t *testing.T) *host {
	t.Helper()
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", fmt.Sprintf("run: {uid: %d, hosts: [h1]}", os.Getuid())))
	return newHost(t, c.AgentToken("h1", "dc1"), true)
}

// memory is what the process holds, and has to.
func memory() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

func (l *limits) open() usage {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all
}

// A workload that fetches as fast as it can is held back, is told so, and takes nothing
// from another one, which is served in time throughout.
func TestGreedyWorkload(t *testing.T) {
	h := anyProcess(t)
	h.server.limits.mu.Lock()
	h.server.limits.rate = 1000 // what a slow machine exceeds, too
	h.server.limits.mu.Unlock()
	before := memory()
	_, result, end := attacker(t, "fetch", h.socket)
	eventually(t, "the flood", func() error {
		h.server.limits.mu.Lock()
		defer h.server.limits.mu.Unlock()
		for key, a := range h.server.limits.processes {
			if key.pid != os.Getpid() && a.spent > 900 {
				return nil
			}
		}
		return fmt.Errorf("not yet")
	})
	count := 100
	if testing.Short() {
		count = 30
	}
	var times []time.Duration
	for range count {
		began := time.Now()
		if got := fetch(t.Context(), h.socket); got != "spiffe://banking.example/accounts" {
			t.Fatalf("the other workload got %s", got)
		}
		times = append(times, time.Since(began))
	}
	slices.Sort(times)
	p99 := times[len(times)*99/100]
	if p99 > time.Second {
		t.Errorf("the other workload waited %v", p99)
	}
	grown := int64(memory()) - int64(before)
	if grown > 64<<20 {
		t.Errorf("grown by %d MiB", grown>>20)
	}
	end()
	served, limited, told, other := result()
	t.Logf("the greedy one: %d served, %d held back; the other one: p50 %v, p99 %v; grown by %d KiB", served, limited, times[len(times)/2], p99, grown>>10)
	if served == 0 || limited == 0 || told != limited || other != 0 {
		t.Errorf("%d served, %d held back, %d of them told when to come back, %d failed otherwise", served, limited, told, other)
	}
}

// Thousands of idle streams: each process gets its share and no more, memory is
// bounded, others are served meanwhile, and everything is given back with the processes.
// ENTENTE_IDLE_STREAMS is how many are tried.
func TestIdleStreams(t *testing.T) {
	streams := 1200
	if testing.Short() {
		streams = 600
	}
	if text := os.Getenv("ENTENTE_IDLE_STREAMS"); text != "" {
		var err error
		if streams, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	h := anyProcess(t)
	before := memory()
	const each = 300 // of which it gets maxStreams
	var results []func() (served, limited, told, other int)
	var hoarders []*exec.Cmd
	for range streams / each {
		cmd, result, _ := attacker(t, strconv.Itoa(each), h.socket)
		hoarders, results = append(hoarders, cmd), append(results, result)
	}
	for _, result := range results {
		if served, limited, told, other := result(); served != maxStreams || limited != each-maxStreams || told != limited || other != 0 {
			t.Errorf("%d served, %d refused, %d of them told when to come back, %d failed otherwise", served, limited, told, other)
		}
	}
	want := usage{6 * len(hoarders), maxStreams * len(hoarders)}
	if got := h.server.limits.open(); got != want {
		t.Errorf("%+v are open, not %+v", got, want)
	}
	grown := (int64(memory()) - int64(before)) / int64(want.streams)
	if grown > 48<<10 {
		t.Errorf("%d KiB for each stream", grown>>10)
	}
	began := time.Now()
	if got := fetch(t.Context(), h.socket); got != "spiffe://banking.example/accounts" {
		t.Errorf("another workload meanwhile got %s", got)
	}
	t.Logf("%d streams, %.1f KiB each; another workload is served in %v", want.streams, float64(grown)/1024, time.Since(began))

	for _, cmd := range hoarders { // they die with everything open
		cmd.Process.Kill()
	}
	eventually(t, "everything given back", func() error {
		if got := h.server.limits.open(); got != (usage{}) {
			return fmt.Errorf("%+v are still counted", got)
		}
		return nil
	})
}

// A client that dies within a request leaves nothing behind, wherever it stops.
func TestClientDiesInRequest(t *testing.T) {
	h := anyProcess(t)
	preface := "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	settings := "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	header := "\x00\x00\x40\x01\x04\x00\x00\x00\x01" // HEADERS with 64 bytes, which do not come
	for _, sent := range []string{"", preface[:9], preface, preface + settings + header, preface + settings + header + strings.Repeat("\x82", 63)} {
		conn, err := net.Dial("unix", h.socket)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, sent); err != nil {
			t.Fatal(err)
		}
		eventually(t, "seen", func() error {
			if h.server.limits.open().connections == 0 {
				return fmt.Errorf("nothing is open")
			}
			return nil
		})
		conn.Close()
		eventually(t, "forgotten", func() error {
			if got := h.server.limits.open(); got != (usage{}) {
				return fmt.Errorf("after %d bytes: %+v", len(sent), got)
			}
			return nil
		})
	}
	if got := fetch(t.Context(), h.socket); got != "spiffe://banking.example/accounts" {
		t.Errorf("control: %s", got)
	}
}

// The Workload API is local: a connection whose peer's process cannot be told gets
// nothing, whoever made it.
// Requirements: 147, 149.
func TestOnlyUnixSockets(t *testing.T) {
	h := anyProcess(t)
	network, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- New(h.agent, network, nil).Run(ctx) }()
	defer func() {
		cancel()
		<-ended
	}()
	client, err := grpc.NewClient(network.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := first(workload.NewSpiffeWorkloadAPIClient(client).FetchX509SVID(withHeader(ctx, "true"), &workload.X509SVIDRequest{})); status.Code(err) != codes.Unavailable {
		t.Errorf("over TCP: %v", err)
	}
	if info, err := os.Stat(h.socket); err != nil || info.Mode() != os.ModeSocket|0o777 {
		t.Errorf("%v, %v", info, err)
	}
	if got := fetch(t.Context(), h.socket); got != "spiffe://banking.example/accounts" {
		t.Errorf("control: %s", got)
	}
}

// Nobody gets more than what is left to the others, and who holds nothing always gets in
// while anything is left.
func TestLimitsOfUsers(t *testing.T) {
	l := newLimits()
	l.most = usage{900, 900}
	hoard := func(uid uint32) (got int) {
		for pid := range 100 {
			for range maxConnections {
				if _, _, err := l.take(process{pid, uid}, usage{connections: 1}, 0); err != nil {
					if status.Code(err) != codes.ResourceExhausted {
						t.Error(err)
					}
					return got
				}
				got++
			}
		}
		return got
	}
	if got := hoard(1); got != 450 {
		t.Errorf("the first user got %d", got)
	}
	if got := hoard(2); got != 225 {
		t.Errorf("the second user got %d", got)
	}
	if got := hoard(1); got != 0 {
		t.Errorf("the first user got %d more", got)
	}
	release, _, err := l.take(process{1, 3}, usage{connections: 1}, 0)
	if err != nil {
		t.Fatalf("a third user: %v", err)
	}
	release()
	if l.all != (usage{connections: 675}) {
		t.Errorf("%+v", l.all)
	}
}

// What was spent is forgotten by the second, and not by connecting anew.
func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimits()
		l.rate = 10
		ask := func(pid int) codes.Code {
			release, _, err := l.take(process{pid, 1}, usage{connections: 1}, 1)
			if err == nil {
				release()
			}
			return status.Code(err)
		}
		for i := range 10 {
			if got := ask(1); got != codes.OK {
				t.Fatalf("%d: %v", i, got)
			}
		}
		began := time.Now()
		if got := ask(1); got != codes.ResourceExhausted || time.Since(began) != busyPause {
			t.Errorf("one too many: %v after %v", got, time.Since(began))
		}
		if got := ask(2); got != codes.OK {
			t.Errorf("another process: %v", got)
		}
		time.Sleep(200 * time.Millisecond)
		for range 2 {
			if got := ask(1); got != codes.OK {
				t.Errorf("after a while: %v", got)
			}
		}
		if got := ask(1); got != codes.ResourceExhausted {
			t.Errorf("and no more than that: %v", got)
		}
		time.Sleep(time.Minute)
		ask(3)
		if len(l.processes) != 1 || l.all != (usage{}) || len(l.users) != 0 {
			t.Errorf("%d processes are remembered, %+v, %v", len(l.processes), l.all, l.users)
		}
	})
}

// Who has too many connections hears it, and is then cut off.
func TestTooManyConnections(t *testing.T) {
	h := anyProcess(t)
	ctx := withHeader(t.Context(), "true")
	for range maxConnections {
		api, _ := raw(t, h.socket)
		if err := first(api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})); err != nil {
			t.Fatal(err)
		}
	}
	api, conn := raw(t, h.socket)
	var result tally
	err := first(api.FetchX509SVID(ctx, &workload.X509SVIDRequest{}))
	result.add(err)
	if result.told.Load() != 1 || !strings.Contains(err.Error(), "64 connections") {
		t.Errorf("one more: %v", err)
	}
	eventually(t, "cut off", func() error {
		if state := conn.GetState(); state.String() == "READY" {
			return fmt.Errorf("it is %v", state)
		}
		return nil
	})
	h.server.limits.mu.Lock()
	defer h.server.limits.mu.Unlock()
	if h.server.limits.refused > 1 {
		t.Errorf("%d are still being told", h.server.limits.refused)
	}
}
