package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Client speaks to an agent's admin socket.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient returns a client of the socket at path. Nothing is dialled yet.
func NewClient(path string) *Client {
	return &Client{path, &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
		IdleConnTimeout: time.Minute,
	}}}
}

// UnreachableError: no agent answers.
type UnreachableError struct{ Err error }

func (e *UnreachableError) Error() string {
	return fmt.Sprintf("no agent answers: %v; is it running on this host, is --socket right, and are you its user or root?", e.Err)
}

func (e *UnreachableError) Unwrap() error { return e.Err }

// RefusedError: the agent has answered no.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return e.Reason }

func (c *Client) call(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	answer, err := c.http.Do(request)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, &UnreachableError{err}
	}
	if answer.StatusCode == http.StatusOK {
		return answer, nil
	}
	defer answer.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(answer.Body, maxBody))
	return nil, &RefusedError{strings.TrimSpace(string(text))}
}

func ask[T any](ctx context.Context, c *Client, method, path string, body []byte) (*T, error) {
	answer, err := c.call(ctx, method, path, body)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	value := new(T)
	if err := json.NewDecoder(io.LimitReader(answer.Body, 64<<20)).Decode(value); err != nil {
		return nil, fmt.Errorf("the agent's answer cannot be read: %w", err)
	}
	return value, nil
}

// Status asks how the agent is.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	return ask[Status](ctx, c, http.MethodGet, "/v1/status", nil)
}

// Explain asks what the agent sees of a process.
func (c *Client) Explain(ctx context.Context, pid int) (*Explanation, error) {
	return ask[Explanation](ctx, c, http.MethodGet, "/v1/pid/"+strconv.Itoa(pid), nil)
}

// Services lists the services of the host.
func (c *Client) Services(ctx context.Context) (*Services, error) {
	return ask[Services](ctx, c, http.MethodGet, "/v1/services", nil)
}

// RegisterServices registers what a drop-in file may hold; file names it in complaints.
func (c *Client) RegisterServices(ctx context.Context, file string, text []byte) (*Services, error) {
	return ask[Services](ctx, c, http.MethodPost, "/v1/services?file="+url.QueryEscape(file), text)
}

// DeregisterService takes back what RegisterServices has registered.
func (c *Client) DeregisterService(ctx context.Context, name string) (*Services, error) {
	return ask[Services](ctx, c, http.MethodDelete, "/v1/services/"+url.PathEscape(name), nil)
}

// DrainService takes a service of the host out and returns when its requests have ended, or
// were cut after the given time; 0: as it is registered.
func (c *Client) DrainService(ctx context.Context, name string, within time.Duration) (*Services, error) {
	return ask[Services](ctx, c, http.MethodPost, drainPath(name, within), nil)
}

// RestoreService ends a drain.
func (c *Client) RestoreService(ctx context.Context, name string) (*Services, error) {
	return ask[Services](ctx, c, http.MethodPost, "/v1/services/"+url.PathEscape(name)+"/restore", nil)
}

func drainPath(name string, within time.Duration) string {
	query := url.Values{}
	if within > 0 {
		query.Set("within", within.String())
	}
	return "/v1/services/" + url.PathEscape(name) + "/drain?" + query.Encode()
}

// HoldDrained is DrainService for as long as this process stays on the line, or until
// release is called.
func (c *Client) HoldDrained(ctx context.Context, name string, within time.Duration) (release func(), err error) {
	_, release, err = c.stay(ctx, drainPath(name, within)+"&hold")
	return release, err
}

// Register makes this process, and all that it starts, satisfy run:id:ID. The
// registration lasts until release is called; gone is closed when it was lost, as
// when the agent was restarted.
func (c *Client) Register(ctx context.Context, id string) (gone <-chan struct{}, release func(), err error) {
	return c.stay(ctx, "/v1/runs/"+id)
}

// stay makes a call whose answer begins when it is done and ends when it is over. ctx
// bounds its beginning only.
func (c *Client) stay(ctx context.Context, path string) (gone <-chan struct{}, release func(), err error) {
	begin := ctx
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(begin, cancel)
	answer, err := c.call(ctx, http.MethodPost, path, nil)
	stop()
	if err != nil {
		cancel()
		return nil, nil, err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer answer.Body.Close()
		io.Copy(io.Discard, answer.Body)
	}()
	return ended, func() { cancel(); <-ended }, nil
}
