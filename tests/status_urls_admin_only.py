"""URLs of a site that has the admin, and has not included the status page."""

from django.contrib import admin
from django.urls import path

urlpatterns = [path("admin/", admin.site.urls)]
